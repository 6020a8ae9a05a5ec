"""Calibrated folding from disk to disk, with the weights of one block of the model in memory at a time.

It is the fold of :mod:`tensorfold.folding.in_memory`, step by step and byte by byte. The model's weights are mapped
from its files and let go when the next block is at work; the states between blocks, moments and finished blocks are
files as well, the last of these under the directory ``OUT.fold``, from which an interrupted fold goes on.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tensorfold.calibration.packed_symmetric import numbers
from tensorfold.calibration.windows import Documents
from tensorfold.data.seen_text import with_notes
from tensorfold.errors import TensorfoldError
from tensorfold.folding.in_memory import fold_resident
from tensorfold.folding.plan import Plan, plan
from tensorfold.folding.result import FoldReport
from tensorfold.hf.loading import new_directory, save_beside
from tensorfold.hf.on_disk import NotStoredError, find_stored, save_in_pieces
from tensorfold.hf.sources import Source
from tensorfold.methods.auto import Auto
from tensorfold.models.anatomy import blocks, matrices
from tensorfold.models.residency import OneBlock
from tensorfold.recipes.recipe import Recipe
from tensorfold.utils.activation_store import ActivationStore
from tensorfold.utils.claims import claimed
from tensorfold.utils.distributed import Ranks
from tensorfold.utils.memory import is_file_mapped, memory_bytes, return_large_blocks
from tensorfold.utils.torch_modes import in_usual_modes

log = logging.getLogger(__name__)

_STREAMS = 3  # of states between blocks, beside those of every block: dense, folded, and the search's

Card = Callable[[FoldReport], dict[str, Any]]


def check_out_of_core(source: Source, recipe: Recipe) -> Plan:
    """The plan of a fold that can go block by block; nothing is loaded.

    Raises:
        NotStoredError: It cannot; the message says what stands in the way.
        InputError, SpecError: As :func:`tensorfold.plan`.
    """
    if recipe.changes_modules:
        raise NotStoredError("the recipe unties, drops or splits parts of the model, which copies them into memory.")
    if any(rule.method.reorders_hidden for rule in recipe.fold):
        raise NotStoredError("the recipe reorders hidden units, which rewrites the weights of whole MLPs in memory.")
    if any(isinstance(rule.method, Auto) and rule.method.plain for rule in recipe.fold):
        raise NotStoredError("plain makes narrower MLPs of all blocks at its end, in memory.")
    planned = plan(find_stored(source.path).model, recipe)
    if planned.split:
        raise NotStoredError("experts of one tensor are taken apart, which copies them into memory.")
    return planned


def is_large(source: Source) -> bool:
    """Whether the weight files of a model on this machine are larger than half of the machine's memory."""
    files = Path(source.path).glob("*.safetensors") if Path(source.path).is_dir() else ()
    return 2 * sum(file.stat().st_size for file in files) > memory_bytes()


@in_usual_modes
def fold_out_of_core(
    source: Source,
    recipe: Recipe,
    out: Path,
    tokenizer: Any,
    documents: Documents,
    tokens: int | None,
    card: Card,
    max_shard_bytes: int,
    progress: bool = False,
) -> FoldReport:
    """Fold a checkpoint on a text into a new directory; see :func:`tensorfold.fold_directory`.

    Args:
        documents: Calibration text.
        tokens: How many tokens of it; the recipe's number, else 24,000, if None.
        card: Makes of the report what the README says.
        max_shard_bytes: Most bytes of a weight file.

    Raises:
        NotStoredError: It cannot go block by block; nothing has been loaded or written.
        TensorfoldError: The disk has not enough room.
    """
    planned = check_out_of_core(source, recipe)
    ranks = Ranks.find(cpu=True)
    with ranks.together():
        partial = Path(f"{out}.fold")
        with claimed(partial, "choose another --out") if ranks.is_first else nullcontext():
            model = source.model()
            _check_mapped(model)
            _check_room(model, planned, partial, recipe, tokens)
            partial.mkdir(parents=True, exist_ok=True)
            return_large_blocks()
            with OneBlock(model, ActivationStore(0, partial)) as residency:
                report = fold_resident(model, recipe, tokenizer, documents, tokens, partial, progress, residency)
            if ranks.is_first:
                with new_directory(out) as directory:
                    save_in_pieces(model, directory, max_shard_bytes)
                    save_beside(directory, model.config, tokenizer, with_notes(card(report), model))
                shutil.rmtree(partial, ignore_errors=True)
    return report


def _check_mapped(model: PreTrainedModel) -> None:
    """Raise :class:`NotStoredError` where loading has made copies of weights instead of mapping them."""
    copied = next((name for name, p in model.named_parameters() if p.dim() > 1 and not is_file_mapped(p)), None)
    if copied is not None:
        raise NotStoredError(f"{copied} is not mapped from its file but was read into memory on this system.")


def _check_room(model: PreTrainedModel, planned: Plan, place: Path, recipe: Recipe, tokens: int | None) -> None:
    """Say how much disk the fold needs beside ``place``, and refuse it where there is less.

    Raises:
        TensorfoldError: There is not enough room.
    """
    needed = disk_need(model, planned, tokens or (recipe.calibrate.tokens if recipe.calibrate else 24_000))
    above = next(folder for folder in (place, *place.resolve().parents) if folder.exists())
    free = shutil.disk_usage(above).free
    log.info("needs up to %.1f GB of disk at %s until it is done; %.1f GB are free", needed / 1e9, above, free / 1e9)
    if needed > free:
        raise TensorfoldError(
            f"The disk has {free / 1e9:.1f} GB free at {above}, and this fold needs up to {needed / 1e9:.1f} GB there: "
            "for the result, finished blocks, states between blocks and gradient moments. Free some space, or choose "
            "another --out."
        )


def disk_need(model: PreTrainedModel, planned: Plan, tokens: int) -> int:
    """Bytes of disk that a fold needs at most: the result twice, moments of gradients, and states between blocks."""
    shared = {name for budget in planned.budgets for name in budget.names}
    moments = sum(numbers(m.out_features) for name, m in matrices(model).items() if name in shared)
    width = model.get_input_embeddings().weight.shape[-1]  # type: ignore[union-attr, index]
    states = (len(blocks(model)[1]) + 1 + _STREAMS) if shared else _STREAMS
    size = torch.float32.itemsize
    return 2 * planned.bytes_before + size * moments + size * states * tokens * int(width)
