"""Few vectors go through functions that a layer prepares; what they are made of may change in any way."""

import copy

import pytest
import torch
from torch import nn

from tensorfold import Spec
from tensorfold.nn import MPOLinear

SPECS = {
    "pivots": Spec.low_rank(24, 18, 5, pivoted=True),
    "fewer rows and columns": Spec.low_rank(24, 18, 5, pivoted=True, rows=20, columns=11),
    "low rank": Spec.low_rank(24, 18, 5),
    "product": Spec.kronecker(24, 18, (6, 3)),
    "products": Spec.kronecker(24, 18, (6, 3), 2),
    "chain": Spec((2, 3, 4), (3, 3, 2), (2, 3)),
}


def layer_of(spec, bias=True, shuffled=True):
    torch.manual_seed(0)
    layer = MPOLinear(spec, bias).eval()
    if shuffled and layer.out_position is not None:
        made = spec.kept_sizes[0]
        order = torch.randperm(spec.out_features)
        layer.out_position.fill_(made)
        layer.out_position[order[:made]] = torch.arange(made)
    if layer.in_order is not None:
        layer.in_order.copy_(torch.randperm(spec.in_features)[: len(layer.in_order)])
    return layer


def dense(layer, x):
    y = x.double() @ layer.to_dense(torch.float64).T
    return y if layer.bias is None else y + layer.bias.double()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("shape", [(18,), (1, 18), (1, 1, 18), (3, 18), (2, 70, 18)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_call_gives_what_the_matrix_gives(spec, shape, dtype):
    layer = layer_of(spec).to(dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(shape).to(dtype)
            y = layer(x)
            assert y.dtype is dtype
            assert y.shape == (*shape[:-1], 24)
            torch.testing.assert_close(y.double(), dense(layer, x), **tolerance)


@pytest.mark.parametrize("first", [0, 4, 19])
@pytest.mark.parametrize("tokens", [1, 3, 600])
def test_pivots_one_behind_the_other_need_no_order(first, tokens):
    layer = layer_of(Spec.low_rank(30, 18, 5, pivoted=True, rows=24), shuffled=False)
    position = torch.cat([torch.arange(5, 5 + first), torch.arange(5), torch.arange(5 + first, 24)])
    layer.out_position.copy_(torch.cat([position, torch.full((6,), 24)]))
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(tokens, 18)
            torch.testing.assert_close(layer(x).double(), dense(layer, x), rtol=1e-5, atol=1e-5)


def _replace_core(layer):
    layer.cores[0] = nn.Parameter(torch.randn_like(layer.cores[0]))


def _assign_data(layer):
    layer.cores[1].data = torch.randn_like(layer.cores[1])


def _in_place(layer):
    layer.cores[1].mul_(2)


def _new_order(layer):
    layer.out_position.copy_(layer.out_position.flip(0))


def _new_bias(layer):
    layer.bias = nn.Parameter(torch.randn(24))


def _no_bias(layer):
    layer.bias = None


def _load(layer):
    layer.load_state_dict(layer_of(layer.spec).state_dict())


@pytest.mark.parametrize("change", [_replace_core, _assign_data, _in_place, _new_order, _new_bias, _no_bias, _load])
@pytest.mark.parametrize("tokens", [1, 3])
def test_changes_between_calls_are_seen(change, tokens):
    layer = layer_of(SPECS["pivots"])
    x = torch.randn(tokens, 18)
    with torch.no_grad():
        for _ in range(2):
            layer(x)
        change(layer)
        torch.testing.assert_close(layer(x).double(), dense(layer, x), rtol=1e-5, atol=1e-5)


def test_a_bias_that_comes_later_is_seen():
    layer = layer_of(SPECS["low rank"], bias=False)
    x = torch.randn(1, 18)
    with torch.no_grad():
        layer(x)
        layer.bias = nn.Parameter(torch.randn(24))
        torch.testing.assert_close(layer(x).double(), dense(layer, x), rtol=1e-5, atol=1e-5)


def test_gradients_autocast_hooks_and_copies_go_their_own_ways():
    layer = layer_of(SPECS["pivots"])
    x = torch.randn(1, 18)
    with torch.no_grad():
        layer(x)
    layer(x).sum().backward()
    assert all(core.grad is not None for core in layer.cores)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    called = []
    layer.cores.register_forward_pre_hook(lambda *_: called.append(1))
    with torch.no_grad():
        layer(x)
    assert called
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.cores[0].zero_()
        torch.testing.assert_close(twin(x).double(), dense(twin, x), rtol=1e-5, atol=1e-5)
        assert twin.half()(x.half()).dtype is torch.float16


def test_onednn_is_on_after_a_vector_in_bf16():
    layer = layer_of(SPECS["low rank"]).bfloat16()
    on = torch._C._get_mkldnn_enabled()
    with torch.no_grad():
        for _ in range(2):
            layer(torch.randn(1, 18).bfloat16())
        assert torch._C._get_mkldnn_enabled() == on
        with torch.backends.mkldnn.flags(enabled=False):
            layer(torch.randn(1, 18).bfloat16())
            assert not torch._C._get_mkldnn_enabled()
