"""Folding in memory: plan, divide budgets on the dense model, then block after block measure, solve and replace."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tensorfold.algebra.solvers.fewer_units import KeptUnits
from tensorfold.calibration.windows import Documents
from tensorfold.errors import InputError
from tensorfold.folding.batches import Batch, batches
from tensorfold.folding.found import Found
from tensorfold.folding.hidden_order import align_hidden_units, order_folded_units, unit_families
from tensorfold.folding.inputs import check_same, checked_plan, identity
from tensorfold.folding.plan import Plan, carry_out
from tensorfold.folding.rank_search import search_ranks
from tensorfold.folding.refine import Refinement
from tensorfold.folding.result import FoldReport
from tensorfold.folding.solve import Solved, cost_of, solve_matrix, solve_rows
from tensorfold.folding.text import Text, read_text
from tensorfold.hf import ties
from tensorfold.hf.described import check_described
from tensorfold.hf.modules import swap
from tensorfold.hf.narrow import Side, narrow
from tensorfold.hf.quantizer import mark_folded
from tensorfold.methods import Method
from tensorfold.methods.base import NOTHING
from tensorfold.models.anatomy import Matrix, check_foldable, dense_weight
from tensorfold.models.modes import evaluation_mode
from tensorfold.models.residency import WHOLE, Residency
from tensorfold.recipes.recipe import Recipe
from tensorfold.utils.block_checkpoints import BlockCheckpoints
from tensorfold.utils.distributed import Ranks
from tensorfold.utils.fingerprints import hash_json
from tensorfold.utils.memory import release_file_pages, release_heap
from tensorfold.utils.terminal import progress_bar
from tensorfold.utils.torch_modes import in_usual_modes
from tensorfold.utils.validation import check_types

log = logging.getLogger(__name__)

_LAYOUT = 5  # of checkpoints: what their blocks hold
_REFINED = "refined: "  # before the names of refined parameters in a checkpoint
_FIRST_BATCH = 2  # of a checkpoint; its blocks 0 and 1 hold the search


@in_usual_modes
def fold(
    model: PreTrainedModel,
    recipe: Recipe | Method | Mapping[str, Any] | str | Path,
    tokenizer: Any = None,
    calibration: Documents | None = None,
    *,
    calibration_tokens: int | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> FoldReport:
    """Replace the targeted weights of ``model`` by structured ones, in place.

    Without calibration text each matrix is approximated in the Frobenius norm. With it, the blocks are taken in order;
    each is measured on the text as the blocks folded before it pass it on, and fitted in the metric of its inputs.
    The rows of the input table weigh by how often all of the text uses their tokens, and are fitted to what errors cost
    where they enter (gradients of the loss) and in a tied head (the states that it reads), before anything else is
    folded; ``token-mps`` looks at none of it.

    Under ``torchrun`` every rank has to call this with the same model, recipe and text, and is left with the same
    folded model. Each matrix is solved by one rank; activations are computed by all of them. On equal machines with
    equally many threads (``torchrun`` sets ``OMP_NUM_THREADS=1`` if it is not set) the result does not depend on the
    number of ranks, to the last bit; on unequal ones it is still the same model on every rank.

    Args:
        model: A decoder-only transformers model with floating-point weights.
        recipe: A recipe, a method (applied to the MLP), a mapping, a shipped recipe's name or a YAML file.
        tokenizer: The model's; needed with ``calibration``.
        calibration: Documents of calibration text, or a list of them for each of several texts, which have
            equal shares; None takes the text that the recipe names, if it names one.
        calibration_tokens: How many tokens of it; the recipe's number, else 24,000.
        checkpoint: Directory for what is solved so far of a calibrated fold; the same call with the dense model goes on
            from there, to the same bytes. The caller removes it. One process only; several keep none.
        progress: Show a progress bar on standard error, on the first rank.

    Raises:
        InputError: Model, recipe or text cannot be used, are not the same on every rank, or not those of the
            checkpoint. Found before anything is changed, but for NaN or infinity in activations and gradients.
        Exception: What another rank raised, on all of them.
    """
    return fold_resident(model, recipe, tokenizer, calibration, calibration_tokens, checkpoint, progress, WHOLE)


def fold_resident(
    model: PreTrainedModel,
    recipe: Recipe | Method | Mapping[str, Any] | str | Path,
    tokenizer: Any,
    calibration: Documents | None,
    calibration_tokens: int | None,
    checkpoint: str | Path | None,
    progress: bool,
    residency: Residency,
) -> FoldReport:
    """The fold of :func:`fold`, with as much of the model in memory as ``residency`` says; the same bytes with any."""
    started = time.monotonic()
    check_foldable(model)
    check_types("fold", checkpoint=(checkpoint, str | Path | None))
    ranks = Ranks.find(cpu=model.device.type in ("cpu", "meta"))
    with ranks.together():
        recipe = Recipe.of(recipe)
        text = read_text(model, recipe, tokenizer, calibration, calibration_tokens)
        planned = checked_plan(model, recipe, text.windows is not None, residency)
        text = text.counted(model, planned, tokenizer)
        check_described(model)
        store = _agree(ranks, model, recipe, text, checkpoint, residency)
        chosen = carry_out(model, recipe, planned)  # from here on the model changes
        ties.settle(model)
        families = unit_families(model)
        with evaluation_mode(model), torch.no_grad(), _Progress(ranks, len(chosen), progress) as bar:
            planned, found = search_ranks(model, planned, chosen, text, ranks, store, bar.works_on, residency)
            chosen = {name: matrix for name, matrix in chosen.items() if name in planned.modules}
            bar.has(len(chosen))
            run = _Run(model, planned, ranks, store, bar, residency)
            parts = batches(model, chosen, planned, text, found, residency.activations)
            for index, batch in enumerate(parts, start=_FIRST_BATCH):
                run.fold(index, batch)
        if _left_plain(model, planned, chosen, found):
            planned = planned.of_plain(model)
        elif chosen:
            if text.windows is not None:  # without text a fold from disk to disk, matrix by matrix, writes the same
                order_folded_units(model, families)
            tied = {matrix.name: matrix.tied_head for matrix in chosen.values() if matrix.tied_head is not None}
            mark_folded(model, planned.modules, tied, planned.split)
    text.note_in(model)
    return FoldReport(
        planned,
        errors={name: run.errors[name] for name in planned.modules},
        metrics={name: _metric(matrix, planned, text, name in found.choices) for name, matrix in chosen.items()},
        calibration_tokens=text.tokens,
        seconds=time.monotonic() - started,
        choices=found.choices,
        calibration_window=text.window,
        calibration_prefix=text.prefix,
        refined={name: (each.before, each.after) for name, each in run.refinements.items()},
    )


def _agree(
    ranks: Ranks,
    model: PreTrainedModel,
    recipe: Recipe,
    text: Text,
    checkpoint: str | Path | None,
    residency: Residency,
) -> BlockCheckpoints | None:
    """Find out if all ranks have been given the same; alone, the checkpoint of this very fold, if one is kept."""
    if checkpoint is not None and text.windows is None:
        raise InputError("fold: checkpoint has no effect here; it needs calibration text, without which none is kept.")
    if ranks.count == 1 and checkpoint is None:
        return None
    given = identity(model, recipe, text, residency)
    if ranks.count > 1:
        check_same(ranks, given)
    elif checkpoint is not None:
        return BlockCheckpoints(Path(checkpoint), hash_json({**given, "layout": _LAYOUT}), "fold")
    return None


def _left_plain(model: PreTrainedModel, planned: Plan, chosen: Mapping[str, Matrix], found: Found) -> bool:
    """Turn a fold that was to leave a plain model into one, in place; False where it was not, or is none.

    Warns where the configuration cannot say how many hidden units are left, or other rules fold something else.
    """
    if not (planned.budgets and all(budget.method.plain for budget in planned.budgets)):
        return False
    turned = {name: turn for name, turn in found.turns.items() if isinstance(turn.basis, KeptUnits)}
    sides = {name: Side(turn.basis.stays, turn.of_values) for name, turn in turned.items()}  # type: ignore[union-attr]
    if narrow(model, chosen, sides):
        return True
    others = sorted(planned.modules.keys() - sides.keys())
    why = (
        f"{len(others)} matrices are folded besides, such as {others[0]}"
        if others
        else "its configuration has no setting for the number of hidden units alone"
    )
    warnings.warn(
        f"plain: {type(model).__name__} stays folded and needs tensorfold to load, since {why}.", stacklevel=3
    )
    return False


def _metric(matrix: Matrix, planned: Plan, text: Text, searched: bool) -> str:
    """What the error of a matrix is measured in, see :class:`FoldReport`."""
    if not text.knows(matrix):
        return "weight"
    if matrix.kind == "embedding":
        return "text" if planned.methods[matrix.name].fits_text else "weight"
    return "loss" if searched else "activation"


class _Progress:
    """A progress bar on the first rank, and what is being worked on in the log of every rank."""

    def __init__(self, ranks: Ranks, total: int, shown: bool) -> None:
        self.ranks, self.bar = ranks, progress_bar("fold", shown and ranks.is_first)
        self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> _Progress:
        self.bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.__exit__(*error)

    def has(self, total: int) -> None:
        """Set the number of matrices."""
        self.bar.update(self.task, total=total)

    def works_on(self, what: str) -> None:
        """Say what is being worked on."""
        self.bar.update(self.task, description=what)
        log.debug("rank %d of %d: %s", self.ranks.index, self.ranks.count, what)

    def advance(self) -> None:
        """Count one matrix as done."""
        self.bar.advance(self.task)


@dataclass(frozen=True)
class _Run:
    """The folding of one batch after another; ``errors`` grows by their matrices, ``refinements`` by their block."""

    model: PreTrainedModel
    planned: Plan
    ranks: Ranks
    store: BlockCheckpoints | None
    bar: _Progress
    residency: Residency
    errors: dict[str, float] = field(default_factory=dict)
    refinements: dict[str, Refinement] = field(default_factory=dict)

    def fold(self, index: int, batch: Batch) -> None:
        """Solve and replace every matrix of a batch, or take its solutions from block ``index`` of the checkpoint."""
        # A new order of hidden units changes matrices that other batches fold, and is in no checkpoint.
        reorders = any(self.planned.methods[matrix.name].reorders_hidden for matrix in batch.matrices)
        store = None if reorders else self.store
        saved = store.load(index) if store else None
        kept: dict[str, Tensor] = {}
        for matrix, solved in self._solved(batch) if saved is None else _from(saved[0], batch):
            self.errors[matrix.name] = solved.error.item()
            kept |= solved.named(matrix.name) if store and saved is None else {}
            swap(self.model, matrix, solved.module(matrix, self.planned.modules[matrix.name]))
            release_file_pages(dense_weight(matrix.module))
            self.bar.advance()
        refined = _restored(self.model, saved) if saved is not None else self._refined(batch)
        if refined is not None:
            self.refinements[refined.block] = refined
            there = {tensor.data_ptr() for tensor in kept.values()}  # solved just now, and refined in place
            refined_tensors = {name: p.detach() for name, p in refined.parameters.items() if p.data_ptr() not in there}
            kept |= {f"{_REFINED}{name}": tensor for name, tensor in refined_tensors.items()}
        if store and saved is None:
            outcome = {} if refined is None else {"block": refined.block, "errors": [refined.before, refined.after]}
            store.save(index, kept, outcome)
        names = [m.name for m in batch.matrices]
        folded = [f"{name}.{key}" for name in names for key, _ in self.model.get_submodule(name).named_parameters()]
        self.residency.keep_in_file([*folded, *(refined.parameters if refined is not None else ())])
        release_heap()

    def _refined(self, batch: Batch) -> Refinement | None:
        """Refine the batch on every rank, and take what the first one found."""
        refined = batch.refine()
        if refined is not None:
            self.ranks.broadcast(refined.parameters.values(), owner=0)
        return refined

    def _solved(self, batch: Batch) -> Iterator[tuple[Matrix, Solved]]:
        """Every matrix of the batch with its solution, each solved by one rank or, row by row, by all of them."""
        ranks, planned = self.ranks, self.planned
        known = align_hidden_units(ranks, self.model, batch.matrices, planned, batch.measure(), self.bar.works_on)

        def solve(matrix: Matrix) -> Solved:
            self.bar.works_on(matrix.name)
            return solve_matrix(matrix, planned, known.pop(matrix.name, NOTHING))

        def unsolved(matrix: Matrix) -> Solved:
            return Solved.unsolved(matrix, planned.modules[matrix.name], matrix.parameter.device)

        divided = [matrix for matrix in batch.matrices if ranks.count > 1 and planned.methods[matrix.name].rowwise]
        yield from ranks.share([m for m in batch.matrices if m not in divided], cost_of, solve, unsolved)
        for matrix in divided:
            self.bar.works_on(matrix.name)
            yield matrix, solve_rows(ranks, matrix, planned)


def _from(tensors: Mapping[str, Tensor], batch: Batch) -> Iterator[tuple[Matrix, Solved]]:
    """Every matrix of the batch with its solution in a checkpoint."""
    for matrix in batch.matrices:
        yield matrix, Solved.from_named(matrix.name, tensors, matrix.parameter.device)


def _restored(model: PreTrainedModel, saved: tuple[Mapping[str, Tensor], Mapping[str, Any]]) -> Refinement | None:
    """The refinement that a checkpoint holds, put back into the model."""
    tensors, outcome = saved
    if not outcome:
        return None
    names = [key.removeprefix(_REFINED) for key in tensors if key.startswith(_REFINED)]
    parameters = {name: model.get_parameter(name) for name in names}
    for name, parameter in parameters.items():
        parameter.copy_(tensors[_REFINED + name])
    return Refinement(outcome["block"], parameters, *outcome["errors"])
