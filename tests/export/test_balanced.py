"""Pivoted layers as balanced factors while a graph in four bits is traced."""

import pytest
import torch

import tensorfold
from tensorfold import LowRank, Recipe, Rule, Spec
from tensorfold.export.balanced import balanced_factors, in_few_bits
from tensorfold.nn import MPOLinear


def in_groups(matrix, bits=4, group=16):
    """The matrix (out, in) rounded to whole numbers with one scale a group along the inputs."""
    parts = matrix.reshape(len(matrix), -1, group)
    scales = parts.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return ((parts / scales.clamp_min(1e-12)).round() * scales).reshape(matrix.shape)


@torch.no_grad()
def test_the_matrices_stay_and_come_back(tiny):
    model = tiny("llama")
    tensorfold.fold(model, Recipe((Rule("all-linear", LowRank(keep=0.6, pivots=True)),)))
    before = dict(model.named_modules())
    ids = torch.arange(20)[None]
    wanted = model(ids).logits
    with balanced_factors(model, 8):
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, MPOLinear)}
        assert layers
        for name, layer in layers.items():
            old = before[name]
            assert not layer.spec.pivoted
            assert layer.spec.ranks[0] % 8 == 0 or layer.spec.ranks[0] == min(layer.out_features, layer.in_features)
            torch.testing.assert_close(layer.to_dense(), old.to_dense(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    assert all(model.get_submodule(name) is module for name, module in before.items() if isinstance(module, MPOLinear))


@torch.no_grad()
def test_what_would_take_more_numbers_than_the_matrix_is_whole():
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    for rank, whole in ((32, False), (40, True)):  # 160 numbers a rank, of 6,144
        model = torch.nn.Module()
        model.layer = MPOLinear.from_dense(weight, LowRank(rank=rank, pivots=True).spec(96, 64))
        own, wanted = model.layer, model.layer.to_dense()
        with balanced_factors(model, 1):
            assert isinstance(model.layer, torch.nn.Linear) is whole
            got = model.layer.weight if whole else model.layer.to_dense()
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        assert model.layer is own


@torch.no_grad()
def test_they_are_rounded_with_smaller_errors():
    torch.manual_seed(0)
    weight = torch.randn(96, 64) @ torch.diag(torch.logspace(0, -2, 64)) @ torch.randn(64, 64)
    spec = LowRank(rank=32, pivots=True).spec(96, 64)
    model = torch.nn.Module()
    model.layer = MPOLinear.from_dense(weight, spec)
    wanted = model.layer.to_dense()

    def error(layer):
        cores = [layer.cores[0].reshape(-1, 32), layer.cores[1].reshape(32, -1)]
        for core, own in zip(layer.cores, cores, strict=True):
            core.copy_(in_groups(own).reshape(core.shape))
        return float((layer.to_dense() - wanted).norm())

    with balanced_factors(model, 1):
        balanced = error(model.layer)
    assert balanced < 0.7 * error(model.layer)


@pytest.mark.parametrize("kept", [{"rows": 20}, {"columns": 9}])
@torch.no_grad()
def test_what_is_zero_stays_zero(kept):
    model = torch.nn.Module()
    model.layer = MPOLinear(Spec.low_rank(24, 16, 4, pivoted=True, **kept))
    wanted = model.layer.to_dense()
    with balanced_factors(model, 1):
        torch.testing.assert_close(model.layer.to_dense(), wanted, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("bits", "changed"), [(8, True), (4, False)])
def test_a_head_that_is_stored_in_eight_bits_is_not_rounded_to_four(tiny, bits, changed):
    model = tiny("llama", tied=False, hidden_size=32)
    tensorfold.fold(model, Recipe((Rule({"regex": "lm_head|up_proj"}, LowRank(rank=32)),)))
    layers = model.lm_head, model.model.layers[0].mlp.up_proj
    before = [layer.to_dense() for layer in layers]
    with in_few_bits(model, "openvino", bits):
        now = [bool((layer.to_dense() != own).any()) for layer, own in zip(layers, before, strict=True)]
    assert now == [changed, True]
    assert all(torch.equal(layer.to_dense(), own) for layer, own in zip(layers, before, strict=True))
