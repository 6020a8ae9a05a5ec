"""How a budget is divided among the linear layers that share it, from what each costs the loss at every rank."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tensorfold.algebra.solvers.low_rank import error_curve
from tensorfold.algebra.solvers.shared_basis import fit_shared_basis
from tensorfold.algebra.solvers.smaller_heads import HeadBasis
from tensorfold.algebra.specs.spec import Spec
from tensorfold.calibration.block_stream import BlockStream, input_moments
from tensorfold.calibration.gradients import gradient_moments
from tensorfold.calibration.packed_symmetric import Packed
from tensorfold.folding.budgets import Choice, Heads, divide, low_rank_spec, searched
from tensorfold.folding.plan import Budget, Plan
from tensorfold.folding.value_heads import Turn, free, value_heads
from tensorfold.methods.auto import EFFORTS, Effort
from tensorfold.models.anatomy import Matrix, by_block, dense_weight
from tensorfold.utils.block_checkpoints import BlockCheckpoints
from tensorfold.utils.distributed import Ranks
from tensorfold.utils.memory import release_heap

_GROUPS = (2, 3, 4)  # of columns, or of rows where there are more of them
_FEW = 128  # tokens, of a look at logits
_ROUNDS = 4  # of a candidate shape: what it gains later decides nothing


@dataclass(frozen=True)
class Search:
    """What is known of the layers that share a budget before the first of them is folded; empty without text.

    Attributes:
        gradients: Second moments of the loss's gradient at their outputs, taken once from the dense model.
        efforts: Of every such layer.
        choices: Of those that the text of the search met.
        starts: Cores that were fitted to the dense model, of layers with other shapes than low rank.
        turns: Of values and outputs whose heads shrink: the basis in which they do.
    """

    gradients: dict[str, Packed] = field(default_factory=dict)
    efforts: dict[str, Effort] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)
    starts: dict[str, list[Tensor]] = field(default_factory=dict)
    turns: dict[str, Turn] = field(default_factory=dict)
    folder: tempfile.TemporaryDirectory[str] | None = None  # of the gradients' files, removed with this object

    def take_gradient(self, name: str) -> Tensor | None:
        """That of one layer, which is then forgotten: together they are as large as half the model."""
        packed = self.gradients.pop(name, None)
        return None if packed is None else packed.full()


def search(
    model: PreTrainedModel,
    planned: Plan,
    chosen: Mapping[str, Matrix],
    windows: Tensor,
    ranks: Ranks,
    store: BlockCheckpoints | None = None,
    works_on: Callable[[str], None] = lambda _: None,
    prefix: int = 0,
) -> tuple[Plan, Search]:
    """Divide every budget of the plan among its layers; those outside the blocks keep their equal shares.

    The curves are exact: eigenvalues give the error of the best matrix of every rank, so no rank is tried. On several
    ranks all measure, and take the choices of the first: on unequal machines the last digit may decide otherwise.

    Args:
        windows: Calibration text, shape (windows, length).
        prefix: How many tokens at the beginning of every window the tokenizer puts before a document.
        store: Gradients are read from its block 0 and choices from its block 1, or written there.

    Returns:
        The plan with the ranks chosen, without the layers that stay dense; and what was found on the way.
    """
    budgets = searched(model, planned)
    if not budgets:
        return planned, Search()
    efforts = {name: EFFORTS[budget.method.effort] for budget in budgets for name in budget.names}
    members = {name: chosen[name] for name in chosen if name in efforts}
    tokens = max((effort.gradient_tokens or windows.numel()) for effort in efforts.values())
    sample = windows[: -(-tokens // windows.shape[1])]
    gradients, folder = _gradients(model, (sample, prefix), members, store, works_on)
    stored = store.load(1) if store else None
    if stored is not None:
        values, outcome = stored
        choices: dict[str, Choice] = {name: Choice(**choice) for name, choice in outcome.items()}
        starts = {name: [values[f"{name}.{k}"] for k in range(2)] for name in choices if f"{name}.0" in values}
        turns = _turns(
            {n: HeadBasis(values[f"{n}.into"], values[f"{n}.back"]) for n in choices if f"{n}.into" in values},
            choices,
            members,
        )
        gradients = _still_needed(gradients, choices)
        return _carried_out(planned, members, choices), Search(gradients, efforts, choices, starts, turns)
    shrinking = {
        name for budget in budgets if budget.method.budget != "bytes" for name in budget.names if efforts[name].heads
    }
    curves, heads = _curves(BlockStream(model, sample), members, gradients, shrinking, works_on)
    own = free(model, sample[:1, :_FEW], [pair for pair, _ in heads])
    heads = [(pair, shrunken) for pair, shrunken in heads if pair in own]
    choices = {}
    bases: dict[str, HeadBasis] = {}
    for budget in _met(model, budgets, members, curves, sample, windows):
        divided, turned = divide(budget, planned, members, curves, heads)
        choices |= divided
        bases |= turned
    del heads
    choices, bases = ranks.gather((choices, bases) if ranks.is_first else None)[0]
    turns = _turns(bases, choices, members)
    gradients = _still_needed(gradients, choices)
    # Groups take more bytes for their order than low rank, and more multiply–adds than they have parameters.
    grouped = {name for budget in budgets if budget.method.budget == "parameters" for name in budget.names}
    shaped = {n: members[n] for n in choices if n in grouped and efforts[n].shapes and _has_groups(members[n])}
    starts = {}
    if shaped:
        fitted = _shapes(BlockStream(model, sample), shaped, gradients, choices, curves, works_on)
        choices |= {name: choice for name, (choice, _) in fitted.items()}
        choices = ranks.gather(choices if ranks.is_first else None)[0]
        starts = {
            name: cores if ranks.is_first else _no_cores(members[name], choices[name])
            for name, (_, cores) in fitted.items()
            if choices[name].groups > 1
        }
        ranks.broadcast((core for cores in starts.values() for core in cores), owner=0)
    if store:
        tensors = {f"{name}.{k}": core for name, cores in starts.items() for k, core in enumerate(cores)}
        for name, basis in bases.items():
            tensors |= {f"{name}.into": basis.into.clone(), f"{name}.back": basis.back.clone()}
        store.save(1, tensors, {name: asdict(choice) for name, choice in choices.items()})
    return _carried_out(planned, members, choices), Search(gradients, efforts, choices, starts, turns, folder)


def _gradients(
    model: PreTrainedModel,
    text: tuple[Tensor, int],
    matrices: Mapping[str, Matrix],
    store: BlockCheckpoints | None,
    works_on: Callable[[str], None],
) -> tuple[dict[str, Packed], tempfile.TemporaryDirectory[str] | None]:
    """Second moments, as large together as half the model, so that they wait on the disk until their matrix is folded.

    ``text``: windows and how many tokens at their beginning are the tokenizer's prefix.

    Without a checkpoint a CPU keeps them in the temporary directory that is returned, and an accelerator in its memory.
    """
    names = {name: f"{k:04d}" for k, name in enumerate(matrices)}
    stored = store.load(0) if store else None
    if store and stored is not None:
        kept, place = stored[1], store.folder("gradients")
        sizes = {name: (matrices[name].out_features, matrices[name].parameter.device) for name in kept}
        return {name: Packed(*sizes[name], path=place / file) for name, file in kept.items()}, None
    windows, prefix = text
    BlockStream(model, windows)  # names the block whose activations are not finite, which gradients cannot
    works_on("gradients")
    folder = None if store else tempfile.TemporaryDirectory()
    place = store.folder("gradients") if store else Path(folder.name if folder else "")
    found: dict[str, Packed] = {}
    order = list(matrices)
    for part in (order[len(order) // 2 :], order[: len(order) // 2]):  # the rest is on the disk by then
        new = gradient_moments(model, windows, {name: matrices[name].module for name in part}, prefix)
        for name, packed in new.items():
            if store or packed.values.device.type == "cpu":
                packed.spill(place / names[name])
            found[name] = packed
        del new
        release_heap()
    if store:
        kept = {name: names[name] for name in found}
        store.save(0, {}, kept, [place / file for file in kept.values()])
    return found, folder


def _still_needed(gradients: Mapping[str, Packed], choices: Mapping[str, Choice]) -> dict[str, Packed]:
    return {name: packed for name, packed in gradients.items() if name in choices and not choices[name].dense}


def _met(
    model: PreTrainedModel,
    budgets: list[Budget],
    matrices: Mapping[str, Matrix],
    curves: Mapping[str, Tensor],
    sample: Tensor,
    windows: Tensor,
) -> list[Budget]:
    """The budgets less the layers that the sample did not meet, such as experts that none of its tokens was sent to.

    Nothing is known of what those cost the loss; they keep their equal shares, and are fitted to their inputs alone.

    Raises:
        InputError: The rest of the text does not meet one either.
    """
    left = {name: matrix for name, matrix in matrices.items() if name not in curves}
    if left:
        stream = BlockStream(model, windows)
        for index, batch in _at_entrances(stream, left):
            # Found now, not when its block is folded; it names the layer.
            input_moments(lambda index=index: stream.advance(index), {n: m.module for n, m in batch.items()})  # type: ignore[misc]
        warnings.warn(
            f"{len(left)} layers are not called on the first {sample.numel()} tokens of the calibration text, from "
            f"{next(iter(left))} on; each gets an equal share of its budget, and is fitted to its inputs without the "
            "loss's gradients. effort: high looks at all of the text.",
            stacklevel=2,
        )
    met = [replace(budget, names=tuple(name for name in budget.names if name in curves)) for budget in budgets]
    return [budget for budget in met if budget.names]


def _has_groups(matrix: Matrix) -> bool:
    return any(max(matrix.out_features, matrix.in_features) % groups == 0 for groups in _GROUPS)


def _shapes(
    stream: BlockStream,
    matrices: Mapping[str, Matrix],
    gradients: Mapping[str, Packed],
    choices: Mapping[str, Choice],
    curves: Mapping[str, Tensor],
    works_on: Callable[[str], None],
) -> dict[str, tuple[Choice, list[Tensor]]]:
    """The choices with a shared basis where that is nearer than low rank of the same size, and then its cores.

    A shape whose matrices cannot have the rank that the error of low rank needs is not fitted: the curve bounds it.
    """
    found = {}
    for index, batch in _at_entrances(stream, matrices):
        moments = input_moments(lambda index=index: stream.advance(index), {n: m.module for n, m in batch.items()})  # type: ignore[misc]
        for name, matrix in batch.items():
            choice = choices[name]
            if choice.dense or choice.rows or choice.columns:
                continue
            works_on(f"shapes of {name}")
            weight, outputs = dense_weight(matrix.module).detach(), gradients[name].full()
            best, rivals = None, {}
            bar = float((curves[name][choice.rank] / curves[name][0]) ** 0.5)
            for groups in _GROUPS:
                spec = _grouped(matrix, groups, choice.parameters)
                if spec is None or curves[name][spec.attainable_matrix_rank] >= curves[name][choice.rank]:
                    continue
                fit = fit_shared_basis(weight, spec, moments[name], outputs, rounds=_ROUNDS)
                rivals[str(spec)] = fit.error
                if fit.error < bar:
                    best, bar = (spec, groups, fit.cores), fit.error
            cores: list[Tensor] = []
            choice = replace(choice, rivals=choice.rivals | rivals)
            if best is not None:
                spec, groups, cores = best
                choice = replace(choice, rank=spec.ranks[0], groups=groups, parameters=spec.parameters)
            found[name] = choice, cores
    return found


def _grouped(matrix: Matrix, groups: int, parameters: int) -> Spec | None:
    """The largest of so many parameters whose groups along the longer side share a basis, if there is one."""
    short, long = sorted((matrix.out_features, matrix.in_features))
    if long % groups:
        return None
    width = long // groups
    slope = short * groups + width
    bond = (slope - math.isqrt(max(0, slope * slope - 4 * parameters - 1)) - 1) // 2  # slope · r − r² in the budget
    bond = min(bond, width - 1, short * groups)
    return _groups_spec(matrix, groups, bond) if bond > 0 else None


def _groups_spec(matrix: Matrix, groups: int, bond: int) -> Spec:
    short, long = sorted((matrix.out_features, matrix.in_features))
    spec = Spec((short, 1), (groups, long // groups), (bond,), reordered=("in",), pivoted=True)
    return spec if matrix.out_features <= matrix.in_features else spec.transposed


def _no_cores(matrix: Matrix, choice: Choice) -> list[Tensor]:
    """Uninitialised memory for those that were fitted to a matrix."""
    like = dense_weight(matrix.module)
    dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
    return [torch.empty(shape, dtype=dtype, device=like.device) for shape in _spec(matrix, choice).core_shapes]


def _carried_out(planned: Plan, members: Mapping[str, Matrix], choices: Mapping[str, Choice]) -> Plan:
    """The plan with these choices."""
    modules = dict(planned.modules)
    for name, choice in choices.items():
        if choice.dense:
            del modules[name]
        else:
            matrix = members[name]
            modules[name] = _spec(matrix, choice)
    dense = sum(choice.parameters for choice in choices.values() if choice.dense)
    saved = sum(planned.modules[name].parameters - choice.parameters for name, choice in choices.items())
    return replace(planned, modules=modules, dense=dense, parameters_after=planned.parameters_after - saved)


def _curves(
    stream: BlockStream,
    matrices: Mapping[str, Matrix],
    gradients: Mapping[str, Packed],
    shrinking: Collection[str],
    works_on: Callable[[str], None],
) -> tuple[dict[str, Tensor], list[Heads]]:
    """Squared error of the best matrix of every rank, on the dense model, of those that the text meets.

    And, of value heads in layers that are ``shrinking``, what values and outputs lose with smaller ones.
    """
    found, heads = {}, []
    for index, batch in _at_entrances(stream, matrices):
        works_on(f"curves of {stream.name}.{index}")
        modules = {name: matrix.module for name, matrix in batch.items()}
        pair = value_heads(stream, index, {name: matrix for name, matrix in batch.items() if name in shrinking})
        moments = input_moments(lambda index=index: stream.advance(index), modules, all_called=False)  # type: ignore[misc]
        for name, matrix in batch.items():
            if name not in moments or name not in gradients:
                continue
            weight = dense_weight(matrix.module).detach()
            found[name] = error_curve(weight, moments[name], gradients[name].full())
        if pair is not None and {pair.values.name, pair.outputs.name} <= found.keys():
            heads.append((pair, pair.shrunken(moments, lambda name: gradients[name].full())))
    return found, heads


def _turns(
    bases: Mapping[str, HeadBasis], choices: Mapping[str, Choice], members: Mapping[str, Matrix]
) -> dict[str, Turn]:
    """The bases on the devices of their layers."""
    turns = {}
    for name, basis in bases.items():
        device = members[name].parameter.device
        moved = HeadBasis(basis.into.to(device), basis.back.to(device))
        turns[name] = Turn(moved, of_values=choices[name].rows > 0)
    return turns


def _spec(matrix: Matrix, choice: Choice) -> Spec:
    if choice.groups == 1:
        return low_rank_spec(matrix, choice.rank, choice.rows, choice.columns)
    return _groups_spec(matrix, choice.groups, choice.rank)


def _at_entrances(stream: BlockStream, matrices: Mapping[str, Matrix]) -> Iterator[tuple[int, dict[str, Matrix]]]:
    """The matrices of every block that has any, with the stream at its entrance."""
    for index, batch in sorted(by_block(matrices, stream.name).items()):
        stream.advance_to(index)
        yield index, batch
