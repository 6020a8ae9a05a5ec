"""Folding: plan, solve, swap, one block after another, in place."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tensorfold.algebra.orders.permutation import search_row_order
from tensorfold.algebra.specs.structure import Structure
from tensorfold.algebra.statistics import Statistics
from tensorfold.data.seen_text import CALIBRATION, Seen, note
from tensorfold.errors import InputError
from tensorfold.folding.batches import Text, batches
from tensorfold.folding.budgets import Choice
from tensorfold.folding.inputs import (
    check_same,
    checked_plan,
    documents,
    identity,
    key_of,
    text_prefix,
    text_windows,
    token_counts_of,
)
from tensorfold.folding.plan import Plan, prepare
from tensorfold.folding.rank_search import Search, search
from tensorfold.folding.solve import ERROR, cost_of, solve_matrix, solve_rows, unsolved_state
from tensorfold.hf import ties
from tensorfold.hf.described import check_described
from tensorfold.hf.modules import empty_module, swap
from tensorfold.hf.quantizer import mark_folded
from tensorfold.methods import Method
from tensorfold.methods.base import NOTHING
from tensorfold.models.anatomy import Matrix, check_foldable, dense_weight, matrices
from tensorfold.models.modes import evaluation_mode
from tensorfold.models.surgery import HiddenUnits, hidden_units, reorder_hidden
from tensorfold.recipes.recipe import Recipe
from tensorfold.utils.block_checkpoints import BlockCheckpoints
from tensorfold.utils.distributed import Ranks
from tensorfold.utils.memory import release_file_pages, release_heap
from tensorfold.utils.terminal import progress_bar
from tensorfold.utils.torch_modes import in_usual_modes
from tensorfold.utils.validation import check_types

log = logging.getLogger(__name__)

_LAYOUT = 3  # of checkpoints: what their blocks hold


@dataclass(frozen=True)
class FoldReport:
    """What a fold did: the plan, each module's relative error, the metric it is measured in, and the time it took.

    ``errors``: ``‖(W − Ŵ) C^½‖ / ‖W C^½‖`` with C the second moment of the module's inputs where it was calibrated
    (``metrics[name] == "activation"``), the identity where not (``"weight"``). Of a layer that shares a budget,
    ``‖G^½ (W − Ŵ) C^½‖ / ‖G^½ W C^½‖`` with G the second moment of the loss's gradient at its outputs, and W what it
    was fitted to (``"loss"``, see ``feedback``). Of a table that was fitted to text, in the metrics of that fit
    (``"text"``, see ``Statistics.metrics``).

    ``calibration_window``: tokens in each calibration window, the ``calibration_prefix`` that the tokenizer puts before
    a document included; 0 and none where the fold was data-free.

    ``choices``: what a search gave each layer that shared a budget, and its error at other sizes.
    """

    plan: Plan
    errors: dict[str, float]
    metrics: dict[str, str]
    calibration_tokens: int
    seconds: float
    choices: dict[str, Choice] = field(default_factory=dict)
    calibration_window: int = 0
    calibration_prefix: tuple[int, ...] = ()

    @property
    def parameters_before(self) -> int:
        return self.plan.parameters_before

    @property
    def parameters_after(self) -> int:
        return self.plan.parameters_after

    @property
    def bytes_before(self) -> int:
        return self.plan.bytes_before

    @property
    def bytes_after(self) -> int:
        return self.plan.bytes_after

    @property
    def modules(self) -> dict[str, Structure]:
        return self.plan.modules

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: the plan's, with ``error`` and ``metric`` for every module."""
        out = self.plan.to_dict()
        for name, module in out["modules"].items():
            module.update(error=self.errors[name], metric=self.metrics[name])
        if self.choices:
            out["choices"] = {name: asdict(choice) for name, choice in self.choices.items()}
        text = {
            "calibration_tokens": self.calibration_tokens,
            "calibration_window": self.calibration_window,
            "calibration_prefix": list(self.calibration_prefix),
        }
        return {**out, **text, "seconds": round(self.seconds, 3)}

    def __str__(self) -> str:
        kinds = sorted(set(self.metrics.values()))
        return self.plan.table(self.errors, f"{'/'.join(kinds)} error")


@in_usual_modes
def fold(
    model: PreTrainedModel,
    recipe: Recipe | Method | Mapping[str, Any] | str | Path,
    tokenizer: Any = None,
    calibration: Iterable[str] | None = None,
    *,
    calibration_tokens: int | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> FoldReport:
    """Replace the targeted weights of ``model`` by matrix product operators, in place.

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
        calibration: Documents of calibration text; None takes the text that the recipe names, if it names one.
        calibration_tokens: How many tokens of it; the recipe's number, else 24,000.
        checkpoint: Directory for what is solved so far of a calibrated fold; the same call with the dense model goes on
            from there, to the same bytes. The caller removes it. One process only; several keep none.
        progress: Show a progress bar on standard error, on the first rank.

    Raises:
        InputError: Model, recipe or text cannot be used, are not the same on every rank, or not those of the
            checkpoint. Found before anything is changed, but for NaN or infinity in activations and gradients.
        Exception: What another rank raised, on all of them.
    """
    started = time.monotonic()
    check_foldable(model)
    check_types("fold", checkpoint=(checkpoint, str | Path | None))
    ranks = Ranks.find(cpu=model.device.type in ("cpu", "meta"))
    with ranks.together():
        recipe = Recipe.of(recipe)
        text = documents(recipe, tokenizer, calibration)
        windows = text_windows(model, recipe, tokenizer, text, calibration_tokens)
        prefix = text_prefix(tokenizer, text)
        counts = token_counts_of(model, checked_plan(model, recipe, windows is not None), tokenizer, text)
        check_described(model)
        if checkpoint is not None and windows is None:
            raise InputError(
                "fold: checkpoint has no effect here; it needs calibration text, without which none is kept."
            )
        store = None
        if ranks.count > 1:
            check_same(ranks, identity(model, recipe, windows, counts))
        elif checkpoint is not None and windows is not None:
            given = {**identity(model, recipe, windows, counts), "layout": _LAYOUT}
            store = BlockCheckpoints(Path(checkpoint), key_of(given), "fold")
        planned, chosen = prepare(model, recipe, ties.disagreement(model))
        ties.settle(model)
        planned, found, errors = _fold_all(
            ranks, model, planned, chosen, Text(windows, counts, len(prefix)), store, progress and ranks.is_first
        )
        chosen = {name: matrix for name, matrix in chosen.items() if name in planned.modules}
        if chosen:
            tied = {matrix.name: matrix.tied_head for matrix in chosen.values() if matrix.tied_head is not None}
            mark_folded(model, planned.modules, tied, planned.split)
    if windows is not None:
        named = recipe.calibrate.text if calibration is None and recipe.calibrate is not None else "the text given"
        note(model, [Seen.of(CALIBRATION, named, windows.numpy())])

    def metric(matrix: Matrix) -> str:
        if windows is None or (matrix.kind == "embedding" and (counts is None or matrix.group != "embedding")):
            return "weight"
        if matrix.kind == "embedding":
            return "text" if planned.methods[matrix.name].fits_text else "weight"
        return "loss" if matrix.name in found.choices else "activation"

    return FoldReport(
        planned,
        errors={name: errors[name] for name in planned.modules},
        metrics={name: metric(matrix) for name, matrix in chosen.items()},
        calibration_tokens=windows.numel() if windows is not None else 0,
        seconds=time.monotonic() - started,
        choices=found.choices,
        calibration_window=windows.shape[1] if windows is not None else 0,
        calibration_prefix=prefix,
    )


def _fold_all(
    ranks: Ranks,
    model: PreTrainedModel,
    planned: Plan,
    chosen: Mapping[str, Matrix],
    text: Text,
    store: BlockCheckpoints | None,
    progress: bool,
) -> tuple[Plan, Search, dict[str, float]]:
    """Solve and replace every chosen matrix; the plan as it was carried out, and the relative error of each."""
    errors: dict[str, float] = {}
    bar = progress_bar("fold", progress)
    task = bar.add_task("", total=len(chosen))
    found = Search()

    def works_on(what: str) -> None:
        bar.update(task, description=what)
        log.debug("rank %d of %d: %s", ranks.index, ranks.count, what)

    with bar, evaluation_mode(model), torch.no_grad():
        if text.windows is not None and planned.budgets:
            planned, found = search(model, planned, chosen, text.windows, ranks, store, works_on, text.prefix)
            chosen = {name: matrix for name, matrix in chosen.items() if name in planned.modules}
            bar.update(task, total=len(chosen))
        for index, (batch, measure) in enumerate(batches(model, chosen, planned, text, found), start=2):
            kept = store if not any(planned.methods[matrix.name].reorders_hidden for matrix in batch) else None
            saved = kept.load(index) if kept else None
            solutions = (
                _solutions(ranks, model, planned, batch, measure, works_on)
                if saved is None
                else _saved(batch, saved[0])
            )
            states: dict[str, Tensor] = {}
            for matrix, solution in solutions:
                states |= {f"{matrix.name}.{key}": tensor for key, tensor in solution.items()} if kept else {}
                errors[matrix.name] = solution.pop(ERROR).item()
                _replace(model, matrix, planned.modules[matrix.name], solution)
                bar.advance(task)
            if kept and saved is None:
                kept.save(index, states, {})
            release_heap()
    return planned, found, errors


def _solutions(
    ranks: Ranks,
    model: PreTrainedModel,
    planned: Plan,
    batch: list[Matrix],
    measure: Callable[[], dict[str, Statistics]],
    works_on: Callable[[str], None],
) -> Iterator[tuple[Matrix, dict[str, Tensor]]]:
    """The state of every module of the batch, and its error."""
    known = _align_hidden_units(ranks, model, batch, planned, measure(), works_on)

    def solve(matrix: Matrix) -> dict[str, Tensor]:
        works_on(matrix.name)
        return solve_matrix(matrix, planned, known.pop(matrix.name, NOTHING))

    def unsolved(matrix: Matrix) -> dict[str, Tensor]:
        return unsolved_state(matrix, planned.modules[matrix.name], matrix.parameter.device)

    divided = [matrix for matrix in batch if ranks.count > 1 and planned.methods[matrix.name].rowwise]
    yield from ranks.share([matrix for matrix in batch if matrix not in divided], cost_of, solve, unsolved)
    for matrix in divided:
        works_on(matrix.name)
        yield matrix, solve_rows(ranks, matrix, planned)


def _saved(batch: list[Matrix], tensors: Mapping[str, Tensor]) -> Iterator[tuple[Matrix, dict[str, Tensor]]]:
    """The same from a checkpoint."""
    for matrix in batch:
        prefix = f"{matrix.name}."
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        yield matrix, {key: value.to(matrix.parameter.device) for key, value in own.items()}


def _align_hidden_units(
    ranks: Ranks,
    model: PreTrainedModel,
    batch: list[Matrix],
    planned: Plan,
    known: dict[str, Statistics],
    works_on: Callable[[str], None],
) -> dict[str, Statistics]:
    """Reorder the hidden units of MLPs whose method asks for it; the statistics follow them."""

    reordered = {matrix.name for matrix in batch if planned.methods[matrix.name].reorders_hidden}
    if not reordered:
        return known

    def members(units: HiddenUnits) -> list[Matrix]:
        return [matrix for matrix in (*units.ups, units.down) if matrix.name in reordered]

    def search(units: HiddenUnits) -> dict[str, Tensor]:
        works_on(f"hidden units of {units.down.name}")
        views = []
        for matrix in members(units):
            weight, spec = dense_weight(matrix.module).detach(), planned.modules[matrix.name]
            moment = known.get(matrix.name, NOTHING).input_moment
            if moment is not None:
                weight = weight * moment.diagonal().sqrt()  # the metric's scale of every input
            views.append((weight.T, spec.transposed) if matrix.name == units.down.name else (weight, spec))
        return {"order": search_row_order(views)[0]}

    def unknown(units: HiddenUnits) -> dict[str, Tensor]:
        return {"order": torch.empty(units.down.in_features, dtype=torch.int64)}

    aligned = dict(known)
    families = [units for units in hidden_units(model, matrices(model)) if members(units)]
    for units, found in ranks.share(families, lambda units: units.down.in_features**3, search, unknown):
        order = found["order"]
        reorder_hidden(units, order.to(units.down.parameter.device))
        for matrix in (*units.ups, units.down):
            if matrix.name in aligned:
                sides = {"columns": order} if matrix is units.down else {"rows": order}
                aligned[matrix.name] = aligned[matrix.name].reordered(**sides)
    return aligned


def _replace(model: PreTrainedModel, matrix: Matrix, spec: Structure, state: dict[str, Tensor]) -> None:
    folded = empty_module(matrix, spec)
    folded.load_state_dict(state, assign=True)
    folded.requires_grad_(matrix.parameter.requires_grad)
    swap(model, matrix, folded)
    release_file_pages(dense_weight(matrix.module))
