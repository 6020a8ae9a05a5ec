"""Dividing one budget of parameters among matrices, by what each loses at every rank.

Minimises ``Σ loss_i(r_i)`` under ``Σ cost_i(r_i) ≤ budget`` with a floor for every matrix. A multiplier λ prices
parameters: each matrix then takes the rank with the smallest ``loss + λ · cost``, whatever the shape of its curves, and
λ is found by bisection (Everett, Operations Research 11, 1963). What that leaves of the budget goes to the steps that
gain the most for what they cost.

Losses are second-order changes of the model's loss, so that they add up over matrices; with errors that do not, such as
relative ones, such an allocation is worse than a uniform one (Swift-SVD, Table 6), and a floor guards against errors
in the estimate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tensorfold.errors import SpecError

_BISECTIONS = 100


@dataclass(frozen=True, eq=False)
class Curve:
    """Loss and cost of one matrix at every choice (rank, say) that it has.

    Attributes:
        losses: Change of the model's loss, (choices,), falling.
        costs: Parameters, or another unit of the budget, (choices,), rising.
        floor: Least cost that the matrix may be given, where it has a choice that reaches it.
    """

    losses: Tensor
    costs: Tensor
    floor: float = 0.0


def allocate(curves: Mapping[str, Curve], budget: int) -> dict[str, int]:
    """Choose for every matrix, so that all losses together are small and all costs together within the budget.

    Args:
        curves: Losses and costs, by name of the matrix.
        budget: In the unit of the costs.

    Returns:
        Index of the choice, by name.

    Raises:
        SpecError: The floors alone exceed the budget.
    """
    allowed = {name: from_floor(curve) for name, curve in curves.items()}

    def at(price: float) -> dict[str, int]:
        return {
            name: first + int((curve.losses[first:] + price * curve.costs[first:]).argmin())
            for (name, curve), first in zip(curves.items(), allowed.values(), strict=True)
        }

    def cost(chosen: Mapping[str, int]) -> float:
        return sum(float(curves[name].costs[index]) for name, index in chosen.items())

    if least(curves) > budget:
        raise SpecError(f"allocate: a budget of {budget:,} parameters; the floors alone need {least(curves):,.0f}.")
    low, high = -80.0, 80.0  # natural logarithms of prices
    if cost(at(math.exp(low))) <= budget:
        return at(math.exp(low))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(at(math.exp(middle))) <= budget else (middle, high)
    chosen = at(math.exp(high))
    if cost(chosen) > budget:  # nothing but the floors is as cheap
        chosen = dict(allowed)
    return _spend(curves, chosen, budget - cost(chosen))


def least(curves: Mapping[str, Curve]) -> float:
    """Cost of all matrices together, each at its floor."""
    return sum(float(curve.costs[from_floor(curve)]) for curve in curves.values())


def from_floor(curve: Curve) -> int:
    """Index of a curve's first choice that costs at least the floor; of the last one if none does."""
    enough = (curve.costs >= curve.floor).nonzero()
    return int(enough[0]) if len(enough) else len(curve.costs) - 1


def _spend(curves: Mapping[str, Curve], chosen: dict[str, int], left: float) -> dict[str, int]:
    """Spend the rest of a budget on single steps along the curves, the best gain for its cost first.

    Args:
        curves: Losses and costs, by name.
        chosen: Index of each matrix's choice, by name; changed in place and returned.
        left: The rest of the budget.
    """
    while True:
        best, gain, paid = "", 0.0, 0.0
        for name, curve in curves.items():
            index = chosen[name]
            if index + 1 >= len(curve.costs):
                continue
            price = float(curve.costs[index + 1] - curve.costs[index])
            saved = float(curve.losses[index] - curve.losses[index + 1])
            if price <= left and saved > gain * max(price, 1e-30):
                best, gain, paid = name, saved / max(price, 1e-30), price
        if not best:
            return chosen
        left -= paid
        chosen[best] += 1


def pivoted_costs(out_features: int, in_features: int) -> Tensor:
    """Parameters ``r (out + in − r)`` of low rank with pivots, for r = 0 … min(out, in); fp64, (min(out, in) + 1,).

    The last is the size of the dense matrix itself.
    """
    ranks = torch.arange(min(out_features, in_features) + 1, dtype=torch.float64)
    return ranks * (out_features + in_features - ranks)


class Division(NamedTuple):
    """What matrices of one joint curve are given: the size of the dimension that they share, and an index on the curve
    of each."""

    size: int
    indices: tuple[int, ...]


def joint_curve(by_size: Mapping[int, tuple[Curve, ...]]) -> tuple[Curve, list[Division]]:
    """What several matrices lose together at every cost, in the best division and size of a dimension they share.

    For one size the divisions that a price for parameters reaches are sums of points on the lower convex hulls of all;
    the steps between them are those of one of the curves.

    Args:
        by_size: Curves of the matrices, in the same order for each size. None gets less than its floor, or than all
            that it can have at that size.

    Returns:
        The curve, losses falling and costs rising; and the division at each of its points.
    """
    points = []
    for size, curves in by_size.items():
        for indices in _divisions(curves):
            chosen = list(zip(curves, indices, strict=True))
            cost = sum(float(curve.costs[k]) for curve, k in chosen)
            loss = sum(float(curve.losses[k]) for curve, k in chosen)
            points.append((cost, loss, Division(size, indices)))
    points.sort()
    kept = points[:1]
    for point in points[1:]:
        if point[1] < kept[-1][1] and point[0] > kept[-1][0]:
            kept.append(point)
    costs, losses = (torch.tensor([point[k] for point in kept], dtype=torch.float64) for k in (0, 1))
    return Curve(losses, costs), [point[2] for point in kept]


def _divisions(curves: Sequence[Curve]) -> Iterator[tuple[int, ...]]:
    """Indices from all floors on, each a step further on the curve whose hull gains most for its cost there."""
    hulls = [_hull(curve, from_floor(curve)) for curve in curves]
    reached, at = [hull[0] for hull in hulls], [0] * len(hulls)
    yield tuple(reached)
    while True:
        best, gain = None, -1.0
        for k, curve in enumerate(curves):
            if at[k] + 1 < len(hulls[k]):
                here, there = hulls[k][at[k]], hulls[k][at[k] + 1]
                slope = float((curve.losses[here] - curve.losses[there]) / (curve.costs[there] - curve.costs[here]))
                if slope > gain:
                    best, gain = k, slope
        if best is None:
            return
        at[best] += 1
        for index in range(reached[best] + 1, hulls[best][at[best]] + 1):
            reached[best] = index
            yield tuple(reached)


def _hull(curve: Curve, first: int) -> list[int]:
    """Indices on the lower convex hull of losses over costs, from ``first`` to the last one."""
    costs, losses = curve.costs.tolist(), curve.losses.tolist()
    kept = [first]
    for k in range(first + 1, len(costs)):
        while len(kept) > 1:
            a, b = kept[-2], kept[-1]
            if (losses[a] - losses[b]) * (costs[k] - costs[a]) > (losses[a] - losses[k]) * (costs[b] - costs[a]):
                break
            kept.pop()
        kept.append(k)
    return kept
