"""Groups of columns or rows with one basis that begins with the identity: the same matrix with fewer numbers."""

import copy

import pytest
import torch

import tensorfold
from tensorfold import Auto, LowRank, Recipe, Rule, Spec, SpecError
from tensorfold.algebra.solvers.pivots import with_pivots_in_basis
from tensorfold.nn import MPOLinear

SHAPES = [(12, 3, 8, 5), (40, 2, 30, 29), (6, 4, 9, 1)]  # out, groups, columns of each, terms


def grouped(rows, groups, width, rank):
    return Spec((rows, 1), (groups, width), (rank,), reordered=("in",), pivoted=True)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(rows, groups, width, rank):
    mix, basis = random(rows, groups, rank), random(rank, width, seed=1)
    return torch.einsum("ogk,kn->ogn", mix, basis).reshape(rows, groups * width)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_of_that_shape_is_kept_exactly_by_fewer_numbers(shape, turned):
    rows, groups, width, rank = shape
    weight, spec = matrix(*shape), grouped(*shape)
    if turned:
        weight, spec = weight.T.contiguous(), spec.transposed
    assert spec.parameters == rank * (rows * groups + width - rank)
    assert spec.grouped == ("out" if turned else "in")
    factors = LowRank(rank=1, pivots=True).solve(weight, spec)
    order = factors.out_order if turned else factors.in_order
    assert torch.equal(order.sort().values, torch.arange(groups * width))
    layer = MPOLinear.from_factors(factors, spec, weight, random(spec.out_features, seed=2))
    assert sum(core.numel() for core in layer.cores) == spec.parameters
    torch.testing.assert_close(layer.to_dense(), weight, rtol=0, atol=1e-10 * float(weight.abs().max()))
    for tokens in (1, 200):
        x = random(tokens, spec.in_features, seed=3)
        torch.testing.assert_close(layer(x), x @ weight.T + layer.bias, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_pivots_change_neither_the_matrix_nor_the_shapes(shape):
    rows, groups, width, rank = shape
    cores = [random(1, rows, groups, rank), random(rank, 1, width, 1, seed=1)]
    (left, basis), order = with_pivots_in_basis(cores, grouped(*shape))
    assert (left.shape, basis.shape) == (cores[0].shape, cores[1].shape)
    assert torch.equal(basis[:, 0, :rank, 0], torch.eye(rank, dtype=torch.float64))
    assert basis.abs().max() < 4
    before, after = (
        torch.einsum("ogk,kn->ogn", a[0], b[:, 0, :, 0]).reshape(rows, -1) for a, b in (cores, (left, basis))
    )
    torch.testing.assert_close(after, before[:, order], rtol=0, atol=1e-10 * float(before.abs().max()))
    stored = [left, basis[:, :, rank:]]
    assert all(torch.equal(a, b) for a, b in zip(grouped(*shape).complete(list(stored)), (left, basis), strict=True))


@pytest.mark.parametrize("turned", [False, True])
def test_gradients_reach_what_is_stored(turned):
    spec = grouped(12, 3, 8, 5)
    layer = MPOLinear(spec.transposed if turned else spec, bias=False, dtype=torch.float64)
    x = random(7, layer.in_features)
    layer(x).square().sum().backward()
    found = [core.grad.clone() for core in layer.cores]
    layer.zero_grad()
    (x @ layer.to_dense().T).square().sum().backward()
    for core, gradient in zip(layer.cores, found, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(core.grad, gradient)


@pytest.mark.parametrize(
    "wrong",
    [
        {"out_modes": (8, 1), "in_modes": (2, 4), "ranks": (4,), "reordered": ("in",)},  # the basis is all columns
        {"out_modes": (8, 1), "in_modes": (2, 4), "ranks": (2,), "reordered": ("out",)},
        {"out_modes": (8, 1), "in_modes": (2, 4), "ranks": (2,)},
        {"out_modes": (4, 2), "in_modes": (2, 4), "ranks": (2,), "reordered": ("in",)},
        {"out_modes": (8, 1), "in_modes": (2, 4), "ranks": (2,), "in_features": 7, "reordered": ("in",)},
    ],
)
def test_what_has_no_pivots_is_refused(wrong):
    with pytest.raises(SpecError, match="pivoted"):
        Spec(**wrong, pivoted=True)


def test_a_stored_spec_is_read_back():
    spec = grouped(12, 3, 8, 5)
    for each in (spec, spec.transposed):
        assert Spec.from_dict(each.to_dict()) == each
    assert spec.transposed.transposed == spec
    assert str(spec) == "5 × (12×3 ⊗ 1×8), pivoted"
    assert str(spec.transposed) == "5 × (3×12 ⊗ 8×1), pivoted"


@pytest.mark.parametrize("turned", [False, True])
def test_a_fresh_layer_has_the_variance_of_a_linear_one(turned):
    torch.manual_seed(0)
    spec = grouped(256, 4, 128, 40)
    layer = MPOLinear(spec.transposed if turned else spec, bias=False)
    assert layer(torch.randn(2000, layer.in_features)).var().item() == pytest.approx(1 / 3, rel=0.15)


def test_a_folded_model_is_read_back(tiny, tokenizer, prose, tmp_path):
    model = tiny("llama", intermediate_size=96)
    for block in model.model.layers:
        block.mlp.down_proj.weight.data = matrix(32, 4, 24, 3).float() * 0.1
        block.mlp.up_proj.weight.data = matrix(32, 4, 24, 3).float().T.contiguous() * 0.1
    kept = copy.deepcopy(model)
    recipe = Recipe(fold=(Rule(["down_proj", "up_proj"], Auto(keep=0.2, effort="high")),))
    report = tensorfold.fold(model, recipe, tokenizer, [prose], calibration_tokens=512)
    assert {spec.grouped for spec in report.modules.values() if spec.pivoted} >= {"in", "out"}
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(tmp_path / "folded")
    again, ids = tensorfold.load(tmp_path / "folded").eval(), torch.arange(12)[None]
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    with torch.no_grad():
        expected = again(ids).logits
        tensorfold.quantize(again)
        assert (again(ids).logits - expected).abs().max() < 0.15 * expected.abs().max()
    by_bytes = Recipe(fold=(Rule(["down_proj"], Auto(keep=0.2, effort="high", budget="bytes")),))
    report = tensorfold.fold(kept, by_bytes, tokenizer, [prose], calibration_tokens=512)
    assert {choice.groups for choice in report.choices.values()} == {1}
