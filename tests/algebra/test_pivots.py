"""Pivoted low rank: the same matrix with fewer numbers, as a spec, as a layer and in whole models."""

import math

import pytest
import torch

import tensorfold
from tensorfold import LowRank, Recipe, Rule, Spec, SpecError
from tensorfold.algebra.contraction import pivots
from tensorfold.algebra.solvers.pivots import with_pivots
from tensorfold.algebra.solvers.solve import Factors, fit, relative_error
from tensorfold.algebra.statistics import Statistics
from tensorfold.nn import MPOLinear

SHAPES = [(96, 64, 12), (64, 96, 40), (48, 48, 47), (30, 7, 1)]


def matrix(rows, columns, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, rank, generator=generator, dtype=torch.float64) @ torch.randn(
        rank, columns, generator=generator, dtype=torch.float64
    )


@pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES)
def test_a_matrix_of_that_rank_is_kept_exactly_by_fewer_numbers(rows, columns, rank):
    weight = matrix(rows, columns, rank)
    spec = Spec.low_rank(rows, columns, rank, pivoted=True)
    assert spec.parameters == rank * (rows + columns - rank) == spec.macs
    factors = LowRank(rank=rank, pivots=True).solve(weight, spec)
    layer = MPOLinear.from_factors(factors, spec, weight)
    assert sum(core.numel() for core in layer.cores) == spec.parameters
    torch.testing.assert_close(layer.to_dense(), weight, rtol=0, atol=1e-10 * float(weight.abs().max()))
    x = matrix(5, columns, min(5, columns), seed=1)
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-9, atol=1e-9 * float((x @ weight.T).abs().max()))


def test_pivots_keep_the_mixing_small():
    cores = fit(torch.randn(300, 80, generator=torch.Generator().manual_seed(0)), Spec.low_rank(300, 80, 40))
    (top, _), order = with_pivots(cores)
    assert torch.equal(top[0, :40, 0], torch.eye(40))
    assert top.abs().max() < 4
    assert torch.equal(order.sort().values, torch.arange(300))
    badly = [cores[0][:, :, :, torch.arange(40)] * torch.logspace(0, -12, 40), cores[1]]  # nearly dependent columns
    assert with_pivots(badly)[0][0].abs().max() < 4


@pytest.mark.parametrize(("rows", "columns"), [(96, 64), (64, 96), (50, 50)])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.8, 0.99])
def test_keep_is_met_from_below_by_less_than_one_rank(rows, columns, keep):
    spec = LowRank(keep=keep, pivots=True).spec(rows, columns)
    rank, budget = spec.ranks[0], math.floor(keep * rows * columns)
    assert spec.parameters <= budget < (rank + 1) * (rows + columns - rank - 1)
    assert rank >= LowRank(keep=keep).spec(rows, columns).ranks[0]


def test_it_is_nearer_than_low_rank_of_the_same_size():
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    metric = matrix(64, 64, 64, seed=2).float()
    metric = metric @ metric.T
    plain, pivoted = LowRank(keep=0.7), LowRank(keep=0.7, pivots=True)
    errors = []
    for method in (plain, pivoted):
        spec = method.spec(96, 64)
        layer = MPOLinear.from_factors(method.solve(weight, spec, Statistics(metric)), spec, weight)
        errors.append(relative_error(weight, layer.to_dense(torch.float64).detach(), metric))
    assert errors[1] < 0.75 * errors[0]


@pytest.mark.parametrize("tokens", [0, 1, 4, 5, 64, 512, 1300])
@pytest.mark.parametrize(
    ("dtype", "units"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)], ids=str
)
def test_tiles_of_tokens_give_what_one_product_gives(monkeypatch, tokens, dtype, units):
    monkeypatch.setattr(pivots, "_has_matrix_units", lambda: units)
    torch.manual_seed(0)
    layer = MPOLinear(Spec.low_rank(40, 24, 10, pivoted=True), dtype=dtype)
    layer.out_position.copy_(torch.randperm(40))
    x = torch.randn(2, tokens, 48, dtype=dtype)[..., :24]  # not contiguous
    expected = layer(x)  # with gradients, for which every product is kept
    assert expected.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5 if dtype is torch.float32 else 1e-1)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype is torch.bfloat16


def test_gradients_reach_what_is_stored():
    weight = matrix(24, 16, 6)
    spec = Spec.low_rank(24, 16, 6, pivoted=True)
    layer = MPOLinear.from_factors(LowRank(rank=6, pivots=True).solve(weight, spec), spec, weight, torch.ones(24))
    x = matrix(3, 16, 3, seed=1)
    layer(x).square().sum().backward()
    dense = layer.to_dense().detach().requires_grad_()
    (x @ dense.T + 1).square().sum().backward()
    order = layer.out_position.argsort()
    rows = dense.grad[order]
    torch.testing.assert_close(layer.cores[0].grad[0, :, 0], rows[6:] @ layer.cores[1][:, 0, :, 0].T)
    torch.testing.assert_close(layer.cores[1].grad[:, 0, :, 0], rows[:6] + layer.cores[0][0, :, 0].T @ rows[6:])


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_models_round_trip_and_export(tiny, tmp_path, architecture):
    model = tiny(architecture).eval()
    report = tensorfold.fold(model, Recipe(fold=(Rule("all-linear", LowRank(keep=0.6, pivots=True)),)))
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(tmp_path / "folded")
    again = tensorfold.load(tmp_path / "folded").eval()
    ids = torch.arange(12)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 15)


@pytest.mark.parametrize(
    "wrong",
    [
        {"out_modes": (8, 2), "in_modes": (4, 1), "ranks": (2,), "reordered": ("out",)},
        {"out_modes": (8, 1), "in_modes": (1, 4), "ranks": (2,)},
        {"out_modes": (4, 1), "in_modes": (1, 8), "ranks": (4,), "reordered": ("out",)},
        {"out_modes": (8, 1), "in_modes": (1, 4), "ranks": (2,), "reordered": ("out",), "scalars": True},
    ],
)
def test_what_has_no_pivots_is_refused(wrong):
    with pytest.raises(SpecError, match="pivoted"):
        Spec(**wrong, pivoted=True)


def test_a_stored_spec_is_read_back():
    spec = Spec.low_rank(8, 4, 2, pivoted=True)
    assert Spec.from_dict(spec.to_dict()) == spec
    with pytest.raises(SpecError, match="rows for pivots"):
        _ = spec.transposed


def test_a_fresh_layer_has_the_variance_of_a_linear_one():
    torch.manual_seed(0)
    layer = MPOLinear(Spec.low_rank(512, 256, 64, pivoted=True), bias=False)
    y = layer(torch.randn(2000, 256))
    assert y.var().item() == pytest.approx(1 / 3, rel=0.1)


def test_factors_of_a_solver_are_whole_cores():
    weight = matrix(10, 8, 3)
    spec = Spec.low_rank(10, 8, 3, pivoted=True)
    factors = LowRank(rank=3, pivots=True).solve(weight, spec)
    assert isinstance(factors, Factors)
    assert tuple(tuple(core.shape) for core in factors.cores) == spec.core_shapes
