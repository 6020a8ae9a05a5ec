"""Folding from disk to disk: the model is never in memory, only one matrix at a time and what its fit needs.

Without calibration text no matrix depends on another, so each is read from the checkpoint's shards, fitted and written
to new ones, and every other weight is copied through. With text, blocks depend on those before them: see
:mod:`tensorfold.folding.out_of_core`.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensorfold.calibration.windows import Documents
from tensorfold.errors import InputError
from tensorfold.folding.inputs import check_method, check_same, check_uses, identity_of
from tensorfold.folding.out_of_core import fold_out_of_core
from tensorfold.folding.plan import Plan, prepare
from tensorfold.folding.result import FoldReport
from tensorfold.folding.solve import Solved, cost_of, solve_matrix
from tensorfold.hf.loading import new_directory, save_beside
from tensorfold.hf.modules import empty_module, scale_of, swap
from tensorfold.hf.on_disk import NotStoredError, Stored, find_stored, own_tensors, save_configuration
from tensorfold.hf.quantizer import mark_folded
from tensorfold.hf.shard_writer import ShardWriter
from tensorfold.hf.sources import Source, find_model
from tensorfold.methods import Method
from tensorfold.methods.base import NOTHING
from tensorfold.models.anatomy import Matrix, check_foldable, dense_weight
from tensorfold.recipes.recipe import Recipe
from tensorfold.utils.atomic_files import check_target
from tensorfold.utils.distributed import Ranks
from tensorfold.utils.memory import release_file_pages
from tensorfold.utils.terminal import progress_bar
from tensorfold.utils.torch_modes import in_usual_modes
from tensorfold.utils.validation import check_types

log = logging.getLogger(__name__)

MAX_SHARD_BYTES = 10**9
_CHUNK = 2**20  # numbers copied at a time

Card = Callable[[FoldReport], dict[str, Any]]


@dataclass(frozen=True)
class Stream:
    """A fold that has been planned and can go from disk to disk."""

    stored: Stored
    recipe: Recipe
    planned: Plan
    chosen: Mapping[str, Matrix]


@in_usual_modes
def fold_directory(
    source: str | Path,
    recipe: Recipe | Method | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    calibration: Documents | None = None,
    calibration_tokens: int | None = None,
    progress: bool = False,
) -> FoldReport:
    """Fold a checkpoint into a new directory without ever holding the model in memory.

    The result is what :func:`tensorfold.fold` makes of the loaded model, and is written whole or not at all. Without
    calibration text the fold goes weight by weight: memory is bounded by the largest matrix that is folded and the work
    space of its fit. With text it goes block by block: memory is bounded by one block, its moments and the work space
    of their decomposition; what is finished lies in the directory ``OUT.fold``, from which the same call goes on after
    an interruption, and which is gone at the end. Under ``torchrun`` every rank has to call this; they divide the
    matrices, and the first one writes.

    Args:
        source: A directory with safetensors, or a hub id that has been downloaded; as ``MODEL`` of the command line.
        recipe: As for :func:`tensorfold.fold`; the text that it names is not read.
        out: Directory to write; must not exist, or be empty.
        calibration: Documents of calibration text, or a list of them for each of several texts, which have
            equal shares; the tokenizer is the one beside the model.
        calibration_tokens: How many tokens of it; the recipe's number, else 24,000.
        progress: Show a progress bar on standard error, on the first rank.

    Raises:
        InputError: The model or the recipe cannot be used, or not in this way: it reorders hidden units, or unties,
            drops or splits parts of the model, or the weights are not stored as the model has them. The message says
            what it is; :func:`tensorfold.fold` and the model's ``save_pretrained`` do all of this.
        TensorfoldError: The disk is full, or has not the room that a calibrated fold needs.
    """
    check_types("fold_directory", source=(source, str | Path), out=(out, str | Path))
    check_target(Path(out))
    recipe = Recipe.of(recipe)
    if recipe.calibrate is not None and calibration is None:
        warnings.warn(
            f"the recipe calibrates on {' and '.join(recipe.calibrate.texts)!r}, but fold_directory reads no text: "
            "folding without. Give it as calibration.",
            stacklevel=2,
        )
    if calibration is None and calibration_tokens is not None:
        raise InputError("fold_directory: calibration_tokens has no effect here; it needs calibration.")
    found = find_model(str(source))

    def card(report: FoldReport) -> dict[str, Any]:
        text = f"{report.calibration_tokens} tokens of the text given" if report.calibration_tokens else None
        return model_facts(found, recipe.name or repr(recipe.fold), report, text)

    try:
        if calibration is not None:
            return fold_out_of_core(
                found, recipe, Path(out), found.tokenizer(), calibration, calibration_tokens, card, MAX_SHARD_BYTES,
                progress,
            )  # fmt: skip
        stream = plan_stream(found, recipe)
    except NotStoredError as error:
        raise InputError(
            f"fold_directory: {error} Load the model and use tensorfold.fold and save_pretrained instead."
        ) from error
    tokenizer, _ = found.tokenizer_beside()
    return fold_stream(stream, Path(out), tokenizer, card, progress)


def model_facts(source: Source, recipe: str, report: FoldReport, calibration: str | None = None) -> dict[str, Any]:
    """What a folded checkpoint says of itself, see :func:`tensorfold.hf.model_card.model_card`.

    Without what differs from one run to the next: equal folds give equal files.
    """
    from tensorfold import __version__

    facts = {"base_model": source.name, "recipe": recipe, "calibration": calibration, **report.to_dict()}
    del facts["seconds"]
    if source.stored is not None:
        facts["source"] = source.stored
    return {**facts, "tensorfold": __version__}


def plan_stream(source: Source, recipe: Recipe) -> Stream:
    """Plan a data-free fold of a checkpoint from its configuration, and the shapes and dtypes in its files.

    Raises:
        NotStoredError: It cannot go from disk to disk.
        InputError, SpecError: As :func:`tensorfold.plan`.
    """
    if recipe.changes_modules:
        raise NotStoredError("the recipe unties, drops or splits parts of the model first.")
    if any(rule.method.reorders_hidden for rule in recipe.fold):
        raise NotStoredError("the recipe reorders hidden units, which ties the fits of an MLP together.")
    stored = find_stored(source.path)
    check_foldable(stored.model)
    planned, chosen = prepare(stored.model, recipe)
    if planned.split:
        raise NotStoredError("the recipe takes experts of one tensor apart.")
    check_uses(stored.model, recipe, planned, recipe.calibrate is not None)
    for name, matrix in chosen.items():
        check_method(planned.methods[name], name, planned, calibrated=False)
        if matrix.kind == "embedding":
            scale_of(matrix)
    return Stream(stored, recipe, planned, chosen)


def fold_stream(stream: Stream, out: Path, tokenizer: Any, card: Card, progress: bool = False) -> FoldReport:
    """Carry out a planned fold; see :func:`fold_directory`.

    Args:
        card: Makes of the report what the README says.
    """
    started = time.monotonic()
    planned, model = stream.planned, stream.stored.model
    ranks = Ranks.find(cpu=True)
    with ranks.together():
        if ranks.count > 1:
            given = {"recipe": identity_of(stream.recipe), **stream.stored.signature()}
            check_same(ranks, given, "model and recipe")
        for matrix in stream.chosen.values():
            swap(model, matrix, empty_module(matrix, planned.modules[matrix.name]))
        tied = {matrix.name: matrix.tied_head for matrix in stream.chosen.values() if matrix.tied_head is not None}
        mark_folded(model, planned.modules, tied, planned.split)
        with new_directory(out) if ranks.is_first else nullcontext() as partial:
            if partial is None:
                errors = _fold_all(ranks, stream, None, False)
            else:
                with ShardWriter(partial, own_tensors(model), planned.parameters_after, MAX_SHARD_BYTES) as writer:
                    _copy_all(stream, writer)
                    errors = _fold_all(ranks, stream, writer, progress)
            report = FoldReport(
                planned,
                errors={name: errors[name] for name in planned.modules},
                metrics=dict.fromkeys(planned.modules, "weight"),
                calibration_tokens=0,
                seconds=time.monotonic() - started,
            )
            if partial is not None:
                save_configuration(model, partial)
                save_beside(partial, model.config, tokenizer, card(report))
    return report


def _copy_all(stream: Stream, writer: ShardWriter) -> None:
    """Write every weight that is not folded, and the biases of those that are."""
    stored = stream.stored
    for name in [name for name in writer.tensors if name in stored.files]:
        whole = stored.tensor(name).reshape(-1)
        finite = True
        for start in range(0, whole.numel(), _CHUNK):
            piece = whole[start : start + _CHUNK]
            finite = finite and _is_finite(piece)
            writer.write(name, piece, start)
            release_file_pages(piece)
        if not finite and isinstance(writer.tensors[name], nn.Parameter):
            log.warning("%s holds NaN or infinity, and was copied as it is.", name)


def _fold_all(ranks: Ranks, stream: Stream, writer: ShardWriter | None, progress: bool) -> dict[str, float]:
    """Solve every chosen matrix and write its cores; the relative error of each."""
    stored, planned = stream.stored, stream.planned
    errors: dict[str, float] = {}
    bar = progress_bar("fold", progress)
    task = bar.add_task("", total=len(stream.chosen))

    def solve(matrix: Matrix) -> Solved:
        bar.update(task, description=matrix.name)
        log.debug("rank %d of %d: %s", ranks.index, ranks.count, matrix.name)
        return solve_matrix(_read(stored, matrix), planned, NOTHING)

    def unsolved(matrix: Matrix) -> Solved:
        return Solved.unsolved(matrix, planned.modules[matrix.name], torch.device("cpu"))

    with bar, torch.no_grad():
        for matrix, solved in ranks.share(list(stream.chosen.values()), cost_of, solve, unsolved):
            errors[matrix.name] = solved.error.item()
            # A tied head has no weights of its own, but an index order of its own where the table has one.
            owners = [owner for owner in (matrix.name, matrix.tied_head) if owner is not None]
            for name, tensor in {f"{owner}.{key}": t for owner in owners for key, t in solved.state.items()}.items():
                if writer is not None and name in writer.tensors and name not in stored.files:
                    writer.write(name, tensor)
            bar.advance(task)
    return errors


def _read(stored: Stored, matrix: Matrix) -> Matrix:
    """The matrix with its weight and bias."""
    module = copy.deepcopy(matrix.module)
    for key, _ in matrix.module.named_parameters(recurse=False):
        setattr(module, key, nn.Parameter(stored.tensor(f"{matrix.name}.{key}"), requires_grad=False))
    if not all(_is_finite(rows) for rows in dense_weight(module).detach().split(_rows(matrix))):
        raise InputError(f"{matrix.name}: its weight holds NaN or infinity; repair the checkpoint or exclude it.")
    return dataclasses.replace(matrix, module=module)


def _rows(matrix: Matrix) -> int:
    return max(1, _CHUNK // matrix.in_features)


def _is_finite(piece: Tensor) -> bool:
    return bool(torch.isfinite(piece).all())
