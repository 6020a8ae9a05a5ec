"""The budgets of a plan: what a layer may have costs, whether all have room for it, and how each is divided."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tensorfold.algebra.allocation import Curve, allocate, joint_curve, least, pivoted_costs
from tensorfold.algebra.orders.stored_orders import order_bytes
from tensorfold.algebra.solvers.fewer_units import KeptUnits
from tensorfold.algebra.solvers.smaller_heads import HeadBasis
from tensorfold.algebra.specs.spec import Spec
from tensorfold.algebra.specs.structure import Structure
from tensorfold.errors import InputError, SpecError
from tensorfold.folding.plan import Budget, Plan
from tensorfold.models.anatomy import Matrix, blocks

_POINTS = 12  # of a curve, in reports
_RAISES = 50  # of a budget that is too small, until it is enough

Change = HeadBasis | KeptUnits


@dataclass(frozen=True)
class Choice:
    """What one matrix was given, and what it would have lost at other sizes.

    Attributes:
        rank: Its rank, or bond; the smaller side of the matrix where it stays dense.
        groups: Of columns, or of rows where there are more, that share a basis; 1 is low rank with pivots.
        rivals: Errors of other shapes at this size, by spec: groups that were fitted, other sizes of heads, other
            numbers of hidden units.
        rows, columns: How many may differ from zero, of layers whose heads or hidden units have become fewer; 0 is all.
        curve: Pairs of parameters and relative error ``‖G^½ (W − Ŵ) C^½‖ / ‖G^½ W C^½‖``, over all ranks; with heads of
            the size that was chosen.
    """

    rank: int
    parameters: int
    dense: bool
    curve: tuple[tuple[int, float], ...]
    groups: int = 1
    rivals: dict[str, float] = field(default_factory=dict)
    rows: int = 0
    columns: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "curve", tuple((int(size), float(error)) for size, error in self.curve))


def searched(model: PreTrainedModel, planned: Plan) -> list[Budget]:
    """The budgets that a search divides: those of the plan, less the layers outside the blocks."""
    try:
        prefix = blocks(model)[0] + "."
    except InputError:
        return []
    inside = [(budget, [name for name in budget.names if name.startswith(prefix)]) for budget in planned.budgets]
    return [replace(budget, names=tuple(names)) for budget, names in inside if names]


def check_budgets(model: PreTrainedModel, planned: Plan) -> None:
    """Find out before anything is measured whether every budget has room for the least that its layers may have.

    Raises:
        SpecError: One has not; of bytes, an equal share of the parameters is no promise of it.
    """
    for budget in searched(model, planned):
        method, size = budget.method, model.dtype.itemsize
        total = sum(planned.modules[name].dense_parameters for name in budget.names)
        given, needed = _given_and_needed(budget, planned, total, size)
        if needed <= given:
            continue
        enough = budget
        for _ in range(_RAISES):  # with the budget rises what is guaranteed to every layer
            raised, least_given = _given_and_needed(enough, planned, total, size)
            if least_given <= raised:
                break
            keep = math.ceil(least_given / total * 1e4) / 1e4
            if keep >= 1:
                break
            enough = replace(budget, method=replace(method, keep=keep))
        raise SpecError(
            f"auto: keep={method.keep} with budget: {method.budget} leaves {given * size:,} bytes to "
            f"{len(budget.names)} layers from {budget.names[0]} on, and the least that they take, with the stored "
            f"order of their rows, is {needed * size:,}; keep at least {enough.method.keep:.4f}, or use budget: "
            "parameters."
        )


def _given_and_needed(budget: Budget, planned: Plan, total: int, size: int) -> tuple[int, int]:
    """Parameters of ``size`` bytes that a budget leaves, and the least that its layers may have."""
    specs = {name: planned.modules[name] for name in budget.names}
    shares = {name: budget.method.spec(spec.out_features, spec.in_features) for name, spec in specs.items()}
    curves = {name: _curve(budget, shares[name], size)[0] for name in budget.names}
    return budget.total(total), math.ceil(least(curves))


class Family(Protocol):
    """Matrices with one dimension in common that may shrink in all of them at once: value heads, hidden units."""

    @property
    def members(self) -> tuple[Matrix, ...]:
        """The matrices; the name of the last is that of the family."""

    @property
    def whole(self) -> int:
        """The size of the dimension as it is."""

    def kept(self, matrix: Matrix, size: int) -> tuple[int, int]:
        """Rows and columns of one of them that are left at a size; 0 is all."""

    def smaller(self, moments: Mapping[str, Tensor], gradients: Callable[[str], Tensor]) -> list[Smaller]:
        """The family at smaller sizes, from second moments of inputs and gradients by name."""


@dataclass(frozen=True, eq=False)
class Smaller:
    """A family at a smaller size.

    Attributes:
        size: Of the dimension.
        curves: Squared errors at every rank of each member, in their order, with what the size itself loses.
        change: What happens to the members.
        full_only: Whether only the full rank of each is to be had, the error of lower ones being unknown.
    """

    size: int
    curves: tuple[Tensor, ...]
    change: Change
    full_only: bool = False


def divide(
    budget: Budget,
    planned: Plan,
    matrices: Mapping[str, Matrix],
    losses: Mapping[str, Tensor],
    families: Sequence[tuple[Family, list[Smaller]]] = (),
) -> tuple[dict[str, Choice], dict[str, Change]]:
    """What every layer of the budget is given, and what happens to the members of families that shrink.

    Args:
        losses: Squared errors of the best matrix of every rank r = 0 … min(out, in), of each layer.
        families: Layers that may shrink together; those of a family are given one share.

    Raises:
        SpecError: As :func:`check_budgets`.
    """
    curves, ranks, multiple = {}, {}, budget.method.multiple
    for name in budget.names:
        size = matrices[name].parameter.element_size()
        curves[name], ranks[name] = _curve(budget, planned.modules[name], size, losses[name])
    total = budget.total(sum(matrices[name].parameter.numel() for name in budget.names))
    shrinking = {}
    for family, smaller in families:
        names = [member.name for member in family.members]
        if not set(names) <= curves.keys():
            continue
        whole = [(curves.pop(name), ranks[name]) for name in names]
        smaller = [each for each in smaller if _divides(multiple, family, each.size)]
        by_size = {each.size: _of_size(family, each, [curve.floor for curve, _ in whole], multiple) for each in smaller}
        by_size[family.whole] = whole
        curves[names[-1]], points = joint_curve({k: tuple(curve for curve, _ in each) for k, each in by_size.items()})
        allowed = {size: [given for _, given in each] for size, each in by_size.items()}
        shrinking[names[-1]] = family, smaller, points, allowed
    choices: dict[str, Choice] = {}
    changes: dict[str, Change] = {}
    for name, index in allocate(curves, total).items():
        if name not in shrinking:
            choices[name] = _choice(matrices[name], int(ranks[name][index]), losses[name])
            continue
        family, smaller, points, allowed = shrinking[name]
        given = points[index]
        for k, (member, at) in enumerate(zip(family.members, given.indices, strict=True)):
            of_size = {family.whole: losses[member.name]} | {each.size: each.curves[k] for each in smaller}
            rank = int(allowed[given.size][k][at])
            choices[member.name] = _of_family(family, member, given.size, rank, of_size)
        if given.size < family.whole:
            change = next(each.change for each in smaller if each.size == given.size)
            changes |= {member.name: change for member in family.members}
    return {name: choices[name] for name in budget.names}, changes


def divide_plainly(
    budget: Budget,
    matrices: Mapping[str, Matrix],
    losses: Mapping[str, Tensor],
    layers: Sequence[tuple[Family, Smaller]],
) -> tuple[dict[str, Choice], dict[str, Change]]:
    """Every hidden layer at its smaller size, with full ranks, and every other matrix as it is.

    Args:
        losses: Squared errors of the best matrix of every rank, of each layer of the budget.
        layers: The hidden layers with the one size that is asked for.
    """
    choices = {name: _choice(matrices[name], len(losses[name]) - 1, losses[name]) for name in budget.names}
    changes: dict[str, Change] = {}
    for family, smaller in layers:
        for member, curve in zip(family.members, smaller.curves, strict=True):
            of_size = {family.whole: losses[member.name], smaller.size: curve}
            choices[member.name] = _of_family(family, member, smaller.size, len(curve) - 1, of_size)
            changes[member.name] = smaller.change
    return choices, changes


def units_left(budget: Budget, matrices: Mapping[str, Matrix]) -> int:
    """How many hidden units every MLP may keep where nothing else of a budget becomes smaller.

    Raises:
        SpecError: MLPs of different widths, or the other matrices alone take more than the budget.
    """
    inside = [matrices[name] for name in budget.names if matrices[name].group == "mlp"]
    widths = {max(matrix.out_features, matrix.in_features) for matrix in inside}
    if len(widths) != 1:
        raise SpecError(f"auto: plain with MLPs of widths {sorted(widths)}; needed one width for all; leave out plain.")
    dense = sum(matrices[name].parameter.numel() for name in budget.names)
    own = sum(matrix.parameter.numel() for matrix in inside)
    left = (budget.total(dense) - (dense - own)) * widths.pop() // own
    left -= left % budget.method.multiple
    if left < 1:
        raise SpecError(
            f"auto: plain with keep={budget.method.keep} leaves the MLPs nothing, since all other targets stay as they "
            f"are; keep more than {(dense - own) / dense:.3f}, or target the MLP alone, with a multiple that their "
            "units reach."
        )
    return left


def low_rank_spec(matrix: Matrix, rank: int, rows: int = 0, columns: int = 0) -> Spec:
    """Low rank with pivots on so many rows and columns, 0 for all; dense on those where the rank is full."""
    shape = (matrix.out_features, matrix.in_features)
    if rank == min(rows or shape[0], columns or shape[1]):
        return Spec.partial(*shape, rows, columns)
    return Spec.low_rank(*shape, rank, pivoted=True, rows=rows, columns=columns)


def _divides(multiple: int, family: Family, size: int) -> bool:
    """Whether it divides all rows and columns that are left of a family's members at a size."""
    return all(left % multiple == 0 for member in family.members for left in family.kept(member, size))


def _allowed(costs: Tensor, multiple: int) -> Tensor:
    """Ranks that may be chosen, of costs for r = 0 …: those that ``multiple`` divides, and the full one."""
    full = len(costs) - 1
    return torch.tensor([rank for rank in range(1, full + 1) if rank % multiple == 0 or rank == full])


def _of_size(family: Family, smaller: Smaller, floors: Sequence[float], multiple: int) -> list[tuple[Curve, Tensor]]:
    """Curves of the members, and the ranks at their points."""
    found = []
    for matrix, losses, floor in zip(family.members, smaller.curves, floors, strict=True):
        rows, columns = family.kept(matrix, smaller.size)
        costs = pivoted_costs(rows or matrix.out_features, columns or matrix.in_features)
        least = float(costs[-1]) if smaller.full_only else floor
        ranks = _allowed(costs, multiple)
        found.append((Curve(losses[ranks], costs[ranks], least), ranks))
    return found


def _curve(budget: Budget, spec: Structure, size: int, losses: Tensor | None = None) -> tuple[Curve, Tensor]:
    """Losses and costs of one layer in parameters of ``size`` bytes, and the ranks at its points.

    Args:
        spec: The layer's equal share.
        losses: Squared errors of every rank from 0 on; zeros without, for costs alone.
    """
    costs = pivoted_costs(spec.out_features, spec.in_features)
    if budget.method.budget == "bytes":  # the dense matrix has no order
        costs[:-1] += order_bytes(spec.out_features, spec.out_features) / size
    ranks = _allowed(costs, budget.method.multiple)
    losses = torch.zeros_like(costs) if losses is None else losses
    return Curve(losses[ranks], costs[ranks], budget.least(spec)), ranks


def _of_family(family: Family, matrix: Matrix, size: int, rank: int, losses: Mapping[int, Tensor]) -> Choice:
    """What one member is given, from its squared errors at every rank at every size of the family."""
    kept = {size: family.kept(matrix, size) for size in losses}
    whole = losses[family.whole][0]
    choice = _choice(matrix, rank, losses[size], whole, *kept[size])
    rivals = {}
    for other, (rows, columns) in kept.items():
        costs = pivoted_costs(rows or matrix.out_features, columns or matrix.in_features)
        at = int((costs <= choice.parameters).sum()) - 1
        if other != size and at > 0 and math.isfinite(losses[other][at]):
            rivals[str(low_rank_spec(matrix, at, rows, columns))] = float(_relative(losses[other], whole)[at])
    return replace(choice, rivals=rivals)


def _choice(
    matrix: Matrix, rank: int, losses: Tensor, whole: Tensor | None = None, rows: int = 0, columns: int = 0
) -> Choice:
    """``losses``: squared errors at every rank from 0 on; ``whole``: that of a zero matrix, if not the first one."""
    costs = pivoted_costs(rows or matrix.out_features, columns or matrix.in_features)
    full, errors = len(costs) - 1, _relative(losses, losses[0] if whole is None else whole)
    points = sorted({rank, *(max(1, round(full * k / _POINTS)) for k in range(1, _POINTS + 1))})
    curve = tuple((int(costs[r]), round(float(errors[r]), 6)) for r in points if math.isfinite(errors[r]))
    dense = rank == full and not (rows or columns)
    return Choice(rank, int(costs[rank]), dense, curve, rows=rows, columns=columns)


def _relative(losses: Tensor, whole: Tensor) -> Tensor:
    return (losses / whole.clamp_min(torch.finfo(losses.dtype).tiny)).sqrt()
