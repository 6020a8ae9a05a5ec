"""Hidden units that go one by one, each time the one that costs least with the others making up for it."""

import itertools

import pytest
import torch

from tensorfold.algebra.solvers.fewer_units import KeptUnits, compensated, eliminate

M, H = 5, 9


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size, seed):
    x = random(4 * size, size, seed=seed) * torch.logspace(0.5, -0.5, size, dtype=torch.float64)
    return x.T @ x / len(x)


def loss(weight, c, g, kept):
    """By brute force: least squares in both metrics, without a formula of the solver's."""
    root = torch.linalg.cholesky(c)
    best = torch.linalg.lstsq(root[kept].T, (weight @ root).T).solution.T
    lack = weight @ root - best @ root[kept]
    return float((lack * (g @ lack)).sum()), best


@pytest.mark.parametrize("seed", range(6))
def test_losses_are_those_of_the_best_matrix_on_the_units_that_stay(seed):
    weight, c, g = random(M, H, seed=seed), moment(H, seed + 10), moment(M, seed + 20)
    found = eliminate(weight, c, g, 1)
    assert len(found.losses) == H + 1
    assert torch.isinf(found.losses[0])
    for size in range(1, H):
        kept = found.kept(size)
        assert len(kept) == size
        wanted, best = loss(weight, c, g, kept)
        assert float(found.losses[size]) == pytest.approx(wanted, rel=1e-3)
        torch.testing.assert_close(compensated(weight, c, kept), best, rtol=1e-4, atol=1e-4)


def test_sizes_are_nested_and_losses_rise():
    weight, c, g = random(M, H), moment(H, 1), moment(M, 2)
    found = eliminate(weight, c, g, 2)
    assert len(found.order) == H - 2
    assert found.losses[H] == 0
    assert (found.losses[2:].diff() < 0).all()
    assert torch.isinf(found.losses[:2]).all()
    for size in range(2, H):
        assert set(found.kept(size).tolist()) < set(found.kept(size + 1).tolist())


def test_the_first_to_go_is_the_cheapest_of_all():
    weight, c, g = random(M, H, seed=3), moment(H, 4), moment(M, 5)
    found = eliminate(weight, c, g, H - 1)
    each = {j: loss(weight, c, g, torch.tensor([k for k in range(H) if k != j]))[0] for j in range(H)}
    assert int(found.order[0]) == min(each, key=each.get)


def test_units_that_do_not_depend_on_each_other_go_by_what_they_add():
    weight, g = random(M, H, seed=6), moment(M, 7)
    c = torch.diag(torch.rand(H, generator=torch.Generator().manual_seed(8), dtype=torch.float64) + 0.1)
    own = torch.einsum("oj,op,pj->j", weight, g, weight) * c.diagonal()
    found = eliminate(weight, c, g, 1)
    assert found.order.tolist() == own.argsort()[:-1].tolist()
    torch.testing.assert_close(found.losses[1:].flip(0)[1:], own.sort().values.cumsum(0)[:-1], rtol=1e-4, atol=0)


def test_doubles_and_the_silent_cost_nothing():
    weight = random(M, H, seed=9)
    x = random(50, H, seed=10)
    x[:, 3], x[:, 5] = 2 * x[:, 1], 0
    found = eliminate(weight, x.T @ x, moment(M, 11), 1)
    gone = found.order[:2].tolist()
    assert 5 in gone
    assert set(gone) & {1, 3}
    assert found.losses[H - 2] < 1e-4 * found.losses[H - 3]


def test_more_than_are_cut_out_at_a_time():
    weight, c, g = random(8, 200, seed=12), moment(200, 13), moment(8, 14)
    found = eliminate(weight, c, g, 20)
    for size in (150, 70, 20):
        assert float(found.losses[size]) == pytest.approx(loss(weight, c, g, found.kept(size))[0], rel=1e-2)


def test_greedy_is_near_the_best_choice():
    weight, c, g = random(M, H, seed=15), moment(H, 16), moment(M, 17)
    found = eliminate(weight, c, g, 1)
    for size in (H - 2, H - 3):
        best = min(loss(weight, c, g, torch.tensor(kept))[0] for kept in itertools.combinations(range(H), size))
        assert float(found.losses[size]) < 1.5 * best


def test_kept_units_silence_all_others():
    stays = torch.tensor([True, False, True])
    kept = KeptUnits(stays)
    assert kept.size == 2
    matrix, bias = random(3, 4), random(3)
    assert torch.equal(kept.rows(matrix)[1], torch.zeros(4).double())
    assert torch.equal(kept.rows(matrix)[stays], matrix[stays])
    assert torch.equal(kept.rows(bias), bias * stays)
    assert torch.equal(kept.columns(random(4, 3)), random(4, 3) * stays)
    g = moment(3, 1)
    assert torch.equal(kept.gradient_moment(g), g * stays * stays[:, None])
