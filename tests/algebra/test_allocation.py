"""The division of a budget against every choice there is."""

import itertools

import pytest
import torch

from tensorfold import SpecError
from tensorfold.algebra.allocation import Curve, _spend, allocate, pivoted_costs


def curves(count, choices=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for k in range(count):
        losses = torch.rand(choices, generator=generator, dtype=torch.float64).sort(descending=True).values
        costs = torch.randint(1, 9, (choices,), generator=generator).cumsum(0).double()
        out[str(k)] = Curve(losses, costs)
    return out


def spent_and_lost(given, chosen):
    spent = sum(float(given[name].costs[k]) for name, k in chosen.items())
    return spent, sum(float(given[name].losses[k]) for name, k in chosen.items())


def least_loss(given, budget):
    """Of all choices within the budget, by trying every one."""
    every = (dict(zip(given, picks, strict=True)) for picks in itertools.product(range(5), repeat=len(given)))
    return min(lost for spent, lost in (spent_and_lost(given, chosen) for chosen in every) if spent <= budget)


def least_loss_of_prices(given, budget):
    """Of what each matrix takes at one price for all, at prices on both sides of every slope between two choices."""
    slopes = {
        float((c.losses[a] - c.losses[b]) / (c.costs[b] - c.costs[a]))
        for c in given.values()
        for a, b in itertools.combinations(range(len(c.costs)), 2)
    }
    found = []
    for price in (slope * side for slope in slopes for side in (1 - 1e-9, 1 + 1e-9)):
        chosen = {name: int((c.losses + price * c.costs).argmin()) for name, c in given.items()}
        spent, lost = spent_and_lost(given, chosen)
        found += [lost] if spent <= budget else []
    return min(found)


@pytest.mark.parametrize("seed", range(8))
def test_an_allocation_is_that_of_the_best_price_and_spends_what_it_leaves(seed):
    given = curves(4, seed=seed)
    least = sum(float(curve.costs[0]) for curve in given.values())
    for budget in (int(least), int(least) + 7, int(least) + 23, 10**6):
        chosen = allocate(given, budget)
        spent, lost = spent_and_lost(given, chosen)
        assert spent <= budget
        assert lost <= least_loss_of_prices(given, budget) + 1e-12
        steps = [(curve.costs, chosen[name]) for name, curve in given.items() if chosen[name] < 4]
        assert all(float(costs[k + 1] - costs[k]) > budget - spent for costs, k in steps)


@pytest.mark.parametrize("seed", range(8))
def test_where_curves_are_convex_and_steps_equally_dear_an_allocation_is_the_best(seed):
    generator = torch.Generator().manual_seed(seed)
    gains = torch.rand(4, 4, generator=generator, dtype=torch.float64).sort(descending=True).values
    costs = 3.0 * torch.arange(1, 6, dtype=torch.float64)
    given = {str(k): Curve(9 - torch.cat([g.new_zeros(1), g.cumsum(0)]), costs) for k, g in enumerate(gains)}
    for budget in (12, 14, 15, 27, 40, 60):
        assert spent_and_lost(given, allocate(given, budget))[1] == pytest.approx(least_loss(given, budget), abs=1e-12)


def test_what_is_left_goes_to_the_best_gain_for_its_cost():
    one_step = Curve(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 5.0]))
    two_steps = Curve(torch.tensor([1.2, 0.6, 0.0]), torch.tensor([1.0, 3.0, 5.0]))
    assert _spend({"one": one_step, "two": two_steps}, {"one": 0, "two": 0}, 4.0) == {"one": 0, "two": 2}


def test_floors_hold_and_can_be_too_many():
    given = {name: Curve(c.losses, c.costs, floor=6) for name, c in curves(4).items()}
    least = sum(float(c.costs[(c.costs >= 6).nonzero()[0]]) for c in given.values())
    chosen = allocate(given, int(least))
    assert all(given[name].costs[k] >= 6 for name, k in chosen.items())
    with pytest.raises(SpecError, match="floors"):
        allocate(given, int(least) - 1)


def test_costs_end_at_the_dense_matrix():
    costs = pivoted_costs(6, 4)
    assert costs.tolist() == [0, 9, 16, 21, 24]
