"""The budgets of a plan: what a layer may have costs, whether all have room for it, and how each is divided."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tensorfold.algebra.allocation import Curve, allocate, least, pivoted_costs
from tensorfold.algebra.orders.stored_orders import order_bytes
from tensorfold.algebra.solvers.smaller_heads import HeadBasis, PairCurves, joint_curve
from tensorfold.algebra.specs.spec import Spec
from tensorfold.algebra.specs.structure import Structure
from tensorfold.errors import InputError, SpecError
from tensorfold.folding.plan import Budget, Plan
from tensorfold.folding.value_heads import ValueHeads
from tensorfold.models.anatomy import Matrix, blocks

_POINTS = 12  # of a curve, in reports
_RAISES = 50  # of a budget that is too small, until it is enough


@dataclass(frozen=True)
class Choice:
    """What one matrix was given, and what it would have lost at other sizes.

    Attributes:
        rank: Its rank, or bond; the smaller side of the matrix where it stays dense.
        groups: Of columns, or of rows where there are more, that share a basis; 1 is low rank with pivots.
        rivals: Errors of other shapes at this size, by spec: groups that were fitted, and other sizes of heads.
        rows, columns: How many may differ from zero, of values and outputs whose heads have shrunk; 0 is all.
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
    curves = {name: _curve(budget, shares[name], size) for name in budget.names}
    return budget.total(total), math.ceil(least(curves))


Heads = tuple[ValueHeads, list[PairCurves]]


def divide(
    budget: Budget,
    planned: Plan,
    matrices: Mapping[str, Matrix],
    losses: Mapping[str, Tensor],
    heads: Sequence[Heads] = (),
) -> tuple[dict[str, Choice], dict[str, HeadBasis]]:
    """What every layer of the budget is given, and the bases of the value heads that shrink, by both their layers.

    Args:
        losses: Of each, squared errors of the best matrix of every rank r = 0 … min(out, in).
        heads: Values and outputs that may have smaller heads; the two are given one share.

    Raises:
        SpecError: As :func:`check_budgets`.
    """
    curves = {}
    for name in budget.names:
        curves[name] = _curve(budget, planned.modules[name], matrices[name].parameter.element_size(), losses[name])
    total = budget.total(sum(matrices[name].parameter.numel() for name in budget.names))
    pairs = {}
    for pair, shrunken in heads:
        names = (pair.values.name, pair.outputs.name)
        if not set(names) <= curves.keys():
            continue
        values, outputs = (curves.pop(name) for name in names)
        by_size = {pair.whole: (values, outputs)} | {
            each.basis.size: _of_size(pair, each, values.floor, outputs.floor) for each in shrunken
        }
        curves[pair.outputs.name], points = joint_curve(by_size)
        pairs[pair.outputs.name] = pair, shrunken, points
    choices: dict[str, Choice] = {}
    bases: dict[str, HeadBasis] = {}
    for name, index in allocate(curves, total).items():
        if name not in pairs:
            choices[name] = _choice(matrices[name], index + 1, losses[name])
            continue
        pair, shrunken, points = pairs[name]
        given = points[index]
        of_values = {pair.whole: losses[pair.values.name]} | {each.basis.size: each.values for each in shrunken}
        of_outputs = {pair.whole: losses[pair.outputs.name]} | {each.basis.size: each.outputs for each in shrunken}
        choices[pair.values.name] = _of_heads(pair, pair.values, given.size, given.values + 1, of_values)
        choices[pair.outputs.name] = _of_heads(pair, pair.outputs, given.size, given.outputs + 1, of_outputs)
        if given.size < pair.whole:
            basis = next(each.basis for each in shrunken if each.basis.size == given.size)
            bases |= {pair.values.name: basis, pair.outputs.name: basis}
    return {name: choices[name] for name in budget.names}, bases


def low_rank_spec(matrix: Matrix, rank: int, rows: int = 0, columns: int = 0) -> Spec:
    """Low rank with pivots on so many rows and columns, 0 for all; dense on those where the rank is full."""
    shape = (matrix.out_features, matrix.in_features)
    if rank == min(rows or shape[0], columns or shape[1]):
        return Spec.partial(*shape, rows, columns)
    return Spec.low_rank(*shape, rank, pivoted=True, rows=rows, columns=columns)


def _of_size(pair: ValueHeads, shrunken: PairCurves, *floors: float) -> tuple[Curve, Curve]:
    """Curves of values and outputs from rank 1 on."""
    found = []
    both = ((pair.values, shrunken.values), (pair.outputs, shrunken.outputs))
    for (matrix, losses), floor in zip(both, floors, strict=True):
        rows, columns = pair.kept(matrix, shrunken.basis.size)
        costs = pivoted_costs(rows or matrix.out_features, columns or matrix.in_features)[1:]
        found.append(Curve(losses[1 : len(costs) + 1], costs, floor))
    return found[0], found[1]


def _curve(budget: Budget, spec: Structure, size: int, losses: Tensor | None = None) -> Curve:
    """Losses and costs of one layer from rank 1 on, in parameters of ``size`` bytes; without losses, costs alone.

    Args:
        spec: The layer's equal share.
    """
    costs = pivoted_costs(spec.out_features, spec.in_features)[1:]
    if budget.method.budget == "bytes":  # the dense matrix has no order
        costs[:-1] += order_bytes(spec.out_features, spec.out_features) / size
    return Curve(torch.zeros_like(costs) if losses is None else losses[1:], costs, budget.least(spec))


def _of_heads(pair: ValueHeads, matrix: Matrix, size: int, rank: int, losses: Mapping[int, Tensor]) -> Choice:
    """What one of the two is given, from its squared errors at every rank with heads of every size."""
    kept = {size: pair.kept(matrix, size) for size in losses}
    whole = losses[pair.whole][0]
    choice = _choice(matrix, rank, losses[size], whole, *kept[size])
    rivals = {}
    for other, (rows, columns) in kept.items():
        costs = pivoted_costs(rows or matrix.out_features, columns or matrix.in_features)
        at = int((costs <= choice.parameters).sum()) - 1
        if other != size and at > 0:
            rivals[str(low_rank_spec(matrix, at, rows, columns))] = float(_relative(losses[other], whole)[at])
    return replace(choice, rivals=rivals)


def _choice(
    matrix: Matrix, rank: int, losses: Tensor, whole: Tensor | None = None, rows: int = 0, columns: int = 0
) -> Choice:
    """``losses``: squared errors at every rank from 0 on; ``whole``: that of a zero matrix, if not the first one."""
    costs = pivoted_costs(rows or matrix.out_features, columns or matrix.in_features)
    full, errors = len(costs) - 1, _relative(losses, losses[0] if whole is None else whole)
    points = sorted({rank, *(max(1, round(full * k / _POINTS)) for k in range(1, _POINTS + 1))})
    curve = tuple((int(costs[r]), round(float(errors[r]), 6)) for r in points)
    dense = rank == full and not (rows or columns)
    return Choice(rank, int(costs[rank]), dense, curve, rows=rows, columns=columns)


def _relative(losses: Tensor, whole: Tensor) -> Tensor:
    return (losses / whole.clamp_min(torch.finfo(losses.dtype).tiny)).sqrt()
