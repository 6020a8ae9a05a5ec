"""One market of structures; every module contract is tested on every one of them. A new method adds a row."""

import copy
import math

import pytest
import torch

from market import MARKET, paths_of
from tensorfold.algebra.contraction.apply import apply
from tensorfold.algebra.contraction.paths import FORMS, cheapest_order
from tensorfold.algebra.contraction.search import fastest_path
from tensorfold.algebra.solvers.solve import relative_error
from tensorfold.algebra.specs.spec import Spec
from tensorfold.methods import MPO, Kronecker, LowRank
from tensorfold.nn import MPOEmbedding, MPOLinear

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=MARKET, ids=str)
def spec(request):
    return MARKET[request.param]


@pytest.fixture(params=[True, False], ids=["bias", "no-bias"])
def bias(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_is_its_matrix(spec, bias, dtype):
    torch.manual_seed(0)
    layer = MPOLinear(spec, bias, dtype=dtype)
    x = torch.randn(2, 3, spec.in_features, dtype=dtype)
    expected = x.double() @ layer.to_dense().double().T + (layer.bias.double() if bias else 0)
    y = layer(x)
    assert y.dtype == dtype
    assert y.shape == (2, 3, spec.out_features)
    tolerance = 50 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        y.double(), expected, rtol=tolerance, atol=tolerance * float(expected.detach().abs().max() + 1)
    )


def test_parameters_are_the_specs(spec, bias):
    layer = MPOLinear(spec, bias, device="meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert sum(p.numel() for p in layer.parameters()) == spec.parameters + (spec.out_features if bias else 0)
    assert (layer.bias is None) is (not bias)
    assert tuple(tuple(core.shape) for core in layer.cores) == spec.core_shapes


def test_multiply_adds_are_the_specs(spec):
    """Counted by torch itself on one token, in the order of fewest; a product with one number a row is a ``mul``."""
    from torch.utils.flop_counter import FlopCounterMode

    path = fastest_path(spec, 1, force="chain")
    outer = {torch.ops.aten.mul: lambda *shapes, out_shape, **_: 2 * math.prod(out_shape)}
    layer = MPOLinear(spec, bias=False)
    factors = layer.factors()
    with FlopCounterMode(display=False, custom_mapping=outer) as counter, torch.no_grad():
        apply(torch.randn(1, spec.in_features), factors, spec, path=path)
    order = cheapest_order(spec.out_modes, spec.in_modes, spec.ranks)
    assert counter.get_total_flops() == 2 * path.macs == 2 * spec.macs == 2 * order.macs


def test_every_path_is_the_matrix(spec, bias):
    """In both directions: outputs, and the gradients of inputs, cores and bias."""
    torch.manual_seed(8)
    layer = MPOLinear(spec, bias, dtype=torch.float64)
    x = torch.randn(2, 3, spec.in_features, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, spec.out_features, dtype=torch.float64)
    sources = [x, *layer.parameters()]
    y = torch.nn.functional.linear(x, layer.to_dense(), layer.bias)
    expected = torch.autograd.grad((y * weights).sum(), sources)
    paths = paths_of(spec)
    assert len(paths) >= spec.sites
    for path in paths:
        got = apply(x, layer.factors(), spec, layer.bias, path)
        torch.testing.assert_close(got, y)
        torch.testing.assert_close(torch.autograd.grad((got * weights).sum(), sources), expected)
        with torch.no_grad():
            torch.testing.assert_close(apply(x, layer.factors(), spec, layer.bias, path), y)


def test_the_market_has_every_kind_of_step():
    steps = [step for spec in MARKET.values() for path in paths_of(spec) for step in path.steps]
    assert {step.form for step in steps} == set(FORMS)
    assert any(step.permutation for step in steps)
    assert any(step.transposed for step in steps)
    assert any(step.more_d for step in steps)
    assert any(step.block > 1 for step in steps)
    paths = [path for spec in MARKET.values() for path in paths_of(spec) if len(path.steps) > 1]
    assert any(isinstance(step.tree, tuple) for path in paths for step in path.steps)


def test_from_dense_inverts_to_dense(spec, bias):
    """A matrix that has the structure comes back; padding may cut it, so only unpadded specs are exact."""
    torch.manual_seed(1)
    layer = MPOLinear(spec, bias, dtype=torch.float64)
    dense = layer.to_dense().detach()
    again = MPOLinear.from_dense(dense, spec, layer.bias)
    padded = spec.to_dict().keys() & {"out_features", "in_features"}
    assert relative_error(dense, again.to_dense().detach()) < (1.0 if padded else 1e-9)
    assert (again.bias is None) is (layer.bias is None)
    assert not bias or torch.equal(again.bias, layer.bias)


def test_metric_never_hurts_what_it_measures(spec):
    """Fitted in the inputs' metric, the output error is at most that of the plain fit."""
    torch.manual_seed(2)
    weight = torch.randn(spec.out_features, spec.in_features, dtype=torch.float64)
    inputs = torch.randn(200, spec.in_features, dtype=torch.float64) * torch.logspace(0, 2, spec.in_features)
    metric = inputs.T @ inputs / 200
    plain = MPOLinear.from_dense(weight, spec).to_dense().detach()
    aware = MPOLinear.from_dense(weight, spec, metric=metric).to_dense().detach()
    assert relative_error(weight, aware, metric) <= relative_error(weight, plain, metric) + 1e-9


def test_gradients_reach_every_parameter(spec, bias):
    torch.manual_seed(3)
    layer = MPOLinear(spec, bias, dtype=torch.float64)
    x = torch.randn(4, spec.in_features, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    dense = torch.nn.Linear(spec.in_features, spec.out_features, bias, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.copy_(layer.to_dense())
        if bias:
            dense.bias.copy_(layer.bias)
    reference = x.detach().clone().requires_grad_()
    dense(reference).square().sum().backward()
    torch.testing.assert_close(x.grad, reference.grad)


def test_state_deepcopy_and_conversion(spec, bias):
    torch.manual_seed(4)
    layer = MPOLinear(spec, bias)
    x = torch.randn(3, spec.in_features)
    other = MPOLinear(spec, bias, device="meta").to_empty(device="cpu")
    other.load_state_dict(layer.state_dict())
    twin = copy.deepcopy(layer)
    assert torch.equal(layer(x), other(x))
    assert torch.equal(layer(x), twin(x))
    with torch.no_grad():
        twin.cores[0].zero_()
    assert not torch.equal(layer(x), twin(x)) or float(layer(x).detach().abs().max()) == 0
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_random_cores_have_the_dense_layers_variance():
    """Averaged over the market: Var[W] = 1/(3·in), whatever the number of sites."""
    for name, spec in MARKET.items():
        torch.manual_seed(5)
        sample = torch.stack([MPOLinear(spec, False).to_dense().detach().square().mean() for _ in range(400)])
        assert float(sample.mean()) * 3 * spec.in_features == pytest.approx(1, abs=0.25), name


def test_embedding_and_its_tied_head(spec):
    torch.manual_seed(6)
    table = MPOEmbedding(spec, scale=2.0)
    dense = table.to_dense()
    index = torch.randint(0, spec.out_features, (2, 5))
    torch.testing.assert_close(table(index), 2.0 * dense[index])
    head = table.head()
    h = torch.randn(3, spec.in_features)
    torch.testing.assert_close(head(h), h @ dense.T, rtol=1e-4, atol=1e-5)
    assert head.bias is None
    assert all(a is b for a, b in zip(head.parameters(), table.parameters(), strict=True))
    (table(index).sum() + head(h).sum()).backward()
    assert all(p.grad is not None for p in table.parameters())
    again = MPOEmbedding.from_dense(dense.detach(), spec, scale=2.0)
    assert relative_error(dense.detach(), again.to_dense().detach()) < (
        1.0 if spec.to_dict().keys() & {"out_features"} else 1e-3
    )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ["kronecker-1", "kronecker-scalars", "low-rank", "mpo-3", "mpo-prime"])
def test_compiles_without_graph_breaks(name, dynamic):
    torch._dynamo.reset()
    torch.manual_seed(7)
    layer = MPOLinear(MARKET[name])
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (1, 4):
        x = torch.randn(tokens, layer.in_features)
        torch.testing.assert_close(compiled(x), layer(x))
    table = MPOEmbedding(MARKET[name])
    lookup = torch.compile(table, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    index = torch.arange(4)
    torch.testing.assert_close(lookup(index), table(index))


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("shape", [(3072, 768), (768, 3072), (576, 576), (131, 67), (50257, 768)], ids=str)
@pytest.mark.parametrize("method", [LowRank, Kronecker, MPO])
def test_keep_is_met_from_below_within_one_bond_step(method, shape, keep):
    rows, columns = shape
    spec = method(keep=keep).spec(rows, columns)
    budget = keep * rows * columns
    assert (spec.out_features, spec.in_features) == shape
    assert spec.parameters <= budget
    larger = spec.ranks[0] + 1
    try:
        step = Spec.from_modes(spec.out_modes, spec.in_modes, larger, rows, columns).parameters - spec.parameters
    except ValueError:
        return  # already the largest bond these modes can have
    assert budget - spec.parameters < step
