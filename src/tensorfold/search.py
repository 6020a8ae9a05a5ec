"""How a budget is divided among the linear layers that share it, from what each costs the loss at every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tensorfold.algebra.allocation import Curve, allocate, pivoted_costs
from tensorfold.algebra.low_rank import error_curve
from tensorfold.algebra.packed import Packed
from tensorfold.algebra.spec import Spec
from tensorfold.anatomy import Matrix, blocks, dense_weight
from tensorfold.auto import EFFORTS, Effort
from tensorfold.block_checkpoints import BlockCheckpoints
from tensorfold.calibrate import BlockStream, second_moments
from tensorfold.errors import InputError
from tensorfold.gradients import gradient_moments
from tensorfold.planning import Budget, Plan

_POINTS = 12  # of a curve, in reports


@dataclass(frozen=True)
class Choice:
    """What one matrix was given, and what it would have lost at other sizes.

    Attributes:
        rank: Its rank; the smaller side of the matrix where it stays dense.
        curve: Pairs of parameters and relative error ``‖G^½ (W − Ŵ) C^½‖ / ‖G^½ W C^½‖``, over all sizes.
    """

    rank: int
    parameters: int
    dense: bool
    curve: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "curve", tuple((int(size), float(error)) for size, error in self.curve))


@dataclass(frozen=True)
class Search:
    """What is known of the layers that share a budget before the first of them is folded; empty without text.

    Attributes:
        gradients: Second moments of the loss's gradient at their outputs, taken once from the dense model.
        efforts: Of every such layer.
    """

    gradients: dict[str, Packed] = field(default_factory=dict)
    efforts: dict[str, Effort] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)

    def take_gradient(self, name: str) -> Tensor | None:
        """That of one layer, which is then forgotten: together they are as large as half the model."""
        packed = self.gradients.pop(name, None)
        return None if packed is None else packed.full()


def search(
    model: PreTrainedModel,
    planned: Plan,
    chosen: Mapping[str, Matrix],
    windows: Tensor,
    store: BlockCheckpoints | None = None,
    works_on: Callable[[str], None] = lambda _: None,
) -> tuple[Plan, Search]:
    """Divide every budget of the plan among its layers; those outside the blocks keep their equal shares.

    The curves are exact: eigenvalues give the error of the best matrix of every rank, so no rank is tried.

    Args:
        windows: Calibration text, shape (windows, length).
        store: What was found is read from its block 0, or written there.

    Returns:
        The plan with the ranks chosen, without the layers that stay dense; and what was found on the way.
    """
    try:
        prefix = blocks(model)[0] + "."
    except InputError:
        return planned, Search()
    shares = [(budget, [name for name in budget.names if name.startswith(prefix)]) for budget in planned.budgets]
    budgets = [replace(budget, names=tuple(names)) for budget, names in shares if names]
    if not budgets:
        return planned, Search()
    efforts = {name: EFFORTS[budget.method.effort] for budget in budgets for name in budget.names}
    members = {name: chosen[name] for name in chosen if name in efforts}
    stored = store.load(0) if store else None
    if stored is not None:
        values, outcome = stored
        gradients = {name: Packed(members[name].out_features, values=value) for name, value in values.items()}
        choices = {name: Choice(**choice) for name, choice in outcome.items()}
        return _carried_out(planned, members, choices), Search(gradients, efforts, choices)
    tokens = max((effort.gradient_tokens or windows.numel()) for effort in efforts.values())
    sample = windows[: -(-tokens // windows.shape[1])]
    stream = BlockStream(model, sample)  # names the block whose activations are not finite, which gradients cannot
    works_on("gradients")
    gradients = gradient_moments(model, sample, {name: matrix.module for name, matrix in members.items()})
    curves = _curves(stream, members, gradients, works_on)
    choices = {}
    for budget in budgets:
        choices |= _divide(budget, planned, members, curves)
    gradients = {name: packed for name, packed in gradients.items() if not choices[name].dense}
    if store:
        store.save(
            0,
            {name: packed.values for name, packed in gradients.items()},
            {name: asdict(choice) for name, choice in choices.items()},
        )
    return _carried_out(planned, members, choices), Search(gradients, efforts, choices)


def _carried_out(planned: Plan, members: Mapping[str, Matrix], choices: Mapping[str, Choice]) -> Plan:
    """The plan with these choices."""
    modules = dict(planned.modules)
    for name, choice in choices.items():
        if choice.dense:
            del modules[name]
        else:
            matrix = members[name]
            modules[name] = Spec.low_rank(matrix.out_features, matrix.in_features, choice.rank, pivoted=True)
    dense = sum(choice.parameters for choice in choices.values() if choice.dense)
    saved = sum(planned.modules[name].parameters - choice.parameters for name, choice in choices.items())
    return replace(planned, modules=modules, dense=dense, parameters_after=planned.parameters_after - saved)


def _curves(
    stream: BlockStream,
    matrices: Mapping[str, Matrix],
    gradients: Mapping[str, Packed],
    works_on: Callable[[str], None],
) -> dict[str, Tensor]:
    """Squared error of the best matrix of every rank, on the dense model."""
    inside: dict[int, dict[str, Matrix]] = {}
    prefix = f"{stream.name}."
    for name, matrix in matrices.items():
        inside.setdefault(int(name.removeprefix(prefix).partition(".")[0]), {})[name] = matrix
    found = {}
    for index in range(max(inside) + 1):
        batch = inside.get(index, {})
        works_on(f"curves of {prefix}{index}")
        if not batch:
            stream.advance(index)
            continue
        modules = {name: matrix.module for name, matrix in batch.items()}
        moments = second_moments(lambda index=index: stream.advance(index), modules)  # type: ignore[misc]
        for name, matrix in batch.items():
            weight = dense_weight(matrix.module).detach()
            found[name] = error_curve(weight, moments[name], gradients[name].full())
    return found


def _divide(
    budget: Budget, planned: Plan, matrices: Mapping[str, Matrix], losses: Mapping[str, Tensor]
) -> dict[str, Choice]:
    method, curves = budget.method, {}
    for name in budget.names:
        matrix = matrices[name]
        costs = pivoted_costs(matrix.out_features, matrix.in_features)[1:]  # from rank 1
        if method.budget == "bytes":  # in units of a parameter; an order is int64, and the dense matrix has none
            costs[:-1] += matrix.out_features * 8 / matrix.parameter.element_size()
        floor = min(method.floor * method.keep * matrix.parameter.numel(), planned.modules[name].parameters)
        curves[name] = Curve(losses[name][1:], costs, floor)
    total = int(method.keep * sum(matrices[name].parameter.numel() for name in budget.names))
    ranks = {name: index + 1 for name, index in allocate(curves, total).items()}
    return {name: _choice(ranks[name], losses[name], matrices[name]) for name in budget.names}


def _choice(rank: int, losses: Tensor, matrix: Matrix) -> Choice:
    costs = pivoted_costs(matrix.out_features, matrix.in_features)[1:]
    whole = len(costs)
    errors = (losses / losses[0].clamp_min(torch.finfo(losses.dtype).tiny)).sqrt()
    points = sorted({rank, *(max(1, round(whole * k / _POINTS)) for k in range(1, _POINTS + 1))})
    curve = tuple((int(costs[r - 1]), round(float(errors[r]), 6)) for r in points)
    return Choice(rank, int(costs[rank - 1]), rank == whole, curve)
