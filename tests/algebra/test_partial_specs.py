"""Matrices of which some rows or columns are zero: what they cost, their layers, and what keeps the others."""

from dataclasses import replace

import pytest
import torch

from tensorfold import LowRank, Spec, SpecError
from tensorfold.algebra.solvers.solve import factorize, fit, relative_error
from tensorfold.algebra.statistics import Statistics
from tensorfold.nn import MPOEmbedding, MPOLinear


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size, seed):
    x = random(3 * size, size, seed=seed) * torch.logspace(0, -1, size, dtype=torch.float64)
    return x.T @ x


PARTIAL = [
    Spec.low_rank(24, 20, 7, pivoted=True, rows=15),
    Spec.low_rank(20, 24, 7, pivoted=True, columns=15),
    Spec.low_rank(20, 24, 15, pivoted=True, columns=15),
    Spec.low_rank(24, 20, 7, pivoted=True, rows=15, columns=9),
    Spec.partial(24, 20, rows=15),
    Spec.partial(20, 24, columns=15),
    Spec.partial(24, 20, rows=15, columns=9),
]


@pytest.mark.parametrize("spec", PARTIAL, ids=str)
def test_parameters_are_those_of_what_may_differ_from_zero(spec):
    rows, columns = spec.inner.out_features, spec.inner.in_features
    rank = spec.ranks[0] if spec.ranks else min(rows, columns)
    assert spec.parameters == spec.inner.parameters == rank * (rows + columns - rank) == spec.macs
    assert Spec.from_dict(spec.to_dict()) == spec
    assert spec.is_partial
    assert not spec.is_padded
    assert not spec.inner.is_partial
    assert "of 24×20" in str(spec) or "of 20×24" in str(spec)


def test_rows_are_zero_only_where_an_order_is_stored():
    with pytest.raises(SpecError, match="out_features=24"):
        Spec((15, 1), (1, 20), (7,), out_features=24)
    with pytest.raises(SpecError, match="in_features=24"):
        Spec((20, 1), (1, 15), (7,), in_features=24, reordered=("out",), pivoted=True)
    with pytest.raises(SpecError, match="zero columns"):
        Spec((20, 1), (1, 15), (7,), reordered=("out", "in"), pivoted=True)


@pytest.mark.parametrize("spec", PARTIAL, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 700])
def test_the_layer_applies_its_matrix(spec, tokens):
    layer = MPOLinear(spec, dtype=torch.float64)
    rows, columns = spec.inner.out_features, spec.inner.in_features
    if layer.out_position is not None:
        order = torch.randperm(spec.out_features, generator=torch.Generator().manual_seed(1))[:rows]
        layer.out_position.fill_(rows)
        layer.out_position[order] = torch.arange(rows)
    if layer.in_order is not None:
        layer.in_order.copy_(torch.randperm(spec.in_features)[:columns])
    dense, x = layer.to_dense(), random(tokens, spec.in_features)
    assert dense.shape == (spec.out_features, spec.in_features)
    assert int((dense != 0).any(1).sum()) == rows
    assert int((dense != 0).any(0).sum()) == columns
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ dense.T + layer.bias)
    x.requires_grad_()
    torch.testing.assert_close(layer(x), x @ dense.T + layer.bias)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(gradient, dense.sum(0).expand_as(x))
    layer.hold_matrix(True)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ dense.T + layer.bias)


@pytest.mark.parametrize("spec", PARTIAL, ids=str)
def test_a_matrix_of_that_form_is_found_again(spec):
    rows = torch.randperm(spec.out_features, generator=torch.Generator().manual_seed(1))[: spec.inner.out_features]
    columns = torch.randperm(spec.in_features, generator=torch.Generator().manual_seed(2))[: spec.inner.in_features]
    weight = torch.zeros(spec.out_features, spec.in_features, dtype=torch.float64)
    rank = spec.ranks[0] if spec.ranks else min(len(rows), len(columns))
    weight[rows[:, None], columns] = random(len(rows), rank) @ random(rank, len(columns), seed=1)
    known = Statistics(input_moment=moment(spec.in_features, 3), gradient_moment=moment(spec.out_features, 4))
    for each in (Statistics(), known):
        factors = LowRank(rank=rank, pivots=True).solve(weight, spec, each)
        layer = MPOLinear.from_factors(factors, spec, weight)
        assert relative_error(weight, layer.to_dense().detach()) < 1e-6
    layer = MPOLinear.from_dense(weight, spec, metric=known.input_moment)
    assert relative_error(weight, layer.to_dense().detach()) < 1e-6


@pytest.mark.parametrize(
    "spec",
    [
        Spec.low_rank(24, 20, 7, pivoted=True),
        Spec((24, 1), (2, 10), (6,), reordered=("in",), pivoted=True),
        Spec((24, 1), (2, 10), (6,), reordered=("in",), pivoted=True).transposed,
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [MPOLinear, MPOEmbedding])
def test_pivots_change_nothing_of_what_is_nearest(kind, spec):
    weight = random(spec.out_features, spec.in_features)
    plain = replace(spec, pivoted=False, reordered=())
    pivoted, nearest = (kind.from_dense(weight, each).to_dense().detach() for each in (spec, plain))
    torch.testing.assert_close(pivoted, nearest)


def test_what_is_kept_makes_up_for_what_is_left_out():
    weight, inputs, outputs = random(12, 10), moment(10, 1), moment(12, 2)
    mixed = random(10, 10, seed=4)
    inputs = mixed @ inputs @ mixed.T
    spec = Spec.partial(12, 10, rows=8, columns=6)
    layer = MPOLinear.from_factors(factorize(weight, spec, inputs, gradient_moment=outputs), spec, weight)
    dense = layer.to_dense().detach()
    rows, columns = (dense.any(dim).nonzero()[:, 0] for dim in (1, 0))
    # The best on these rows and columns leaves no gradient of the error there.
    gradient = (outputs @ (weight - dense) @ inputs)[rows][:, columns]
    cut = torch.zeros_like(weight)
    cut[rows[:, None], columns] = weight[rows][:, columns]
    assert gradient.norm() < 1e-4 * (outputs @ (weight - cut) @ inputs)[rows][:, columns].norm()


def test_partial_specs_that_cannot_be_are_refused():
    with pytest.raises(SpecError, match="rows=30"):
        Spec.partial(24, 20, rows=30)
    with pytest.raises(SpecError, match="columns=21"):
        Spec.low_rank(24, 20, 5, pivoted=True, columns=21)
    with pytest.raises(SpecError, match="pivoted=True"):
        Spec.low_rank(24, 20, 5, rows=10)
    with pytest.raises(SpecError, match="pivoted with"):
        Spec((24, 1), (2, 10), (6,), 24, 30, reordered=("in",), pivoted=True)
    spec, weight = Spec.partial(24, 20, columns=9), random(24, 20)
    for metric in (moment(7, 1), torch.full((20, 20), torch.nan)):
        with pytest.raises(SpecError, match="metric"):
            factorize(weight, spec, metric)


def test_what_is_left_out_has_to_be_chosen():
    weight = random(24, 20)
    spec = Spec.partial(24, 20, rows=15)
    with pytest.raises(SpecError, match="factorize"):
        fit(weight, spec)
    with pytest.raises(SpecError, match="a table needs all"):
        MPOEmbedding.from_dense(weight, spec)


def test_the_largest_rows_and_columns_are_kept():
    weight = torch.ones(6, 5, dtype=torch.float64)
    weight[[1, 4]] *= 10
    weight[:, 3] *= 5
    spec = Spec.low_rank(6, 5, 1, pivoted=True, rows=2, columns=1)
    kept = MPOLinear.from_factors(LowRank(rank=1, pivots=True).solve(weight, spec), spec, weight).to_dense()
    wanted = torch.zeros_like(weight)
    wanted[[1, 4], 3] = 50
    torch.testing.assert_close(kept, wanted)
    # Inputs that are never there count for nothing, however large their column is.
    inputs = torch.eye(5, dtype=torch.float64)
    inputs[3, 3] = 0
    factors = LowRank(rank=1, pivots=True).solve(weight, spec, Statistics(input_moment=inputs))
    assert int(factors.in_order) != 3
