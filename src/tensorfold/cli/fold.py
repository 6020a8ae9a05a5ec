"""``tensorfold fold``: a folded copy of a model, written to disk."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorfold.cli.given import recipe_of, source_of
from tensorfold.cli.options import (
    OWN_TEXT_HELP,
    Dtype,
    Json,
    Keep,
    ModelOrRecipe,
    Multiple,
    OneDevice,
    RecipeName,
    TargetNames,
    Untie,
)
from tensorfold.cli.output import emit

if TYPE_CHECKING:
    from tensorfold.folding.from_disk import Stream
    from tensorfold.hf.sources import Source
    from tensorfold.recipes.recipe import Recipe

log = logging.getLogger(__name__)

_UNASKED = 8192  # tokens of the text that the model writes where none is given


def fold(
    out: Annotated[Path, typer.Option("--out", help="Directory to write; must not exist, or be empty.")],
    model: ModelOrRecipe = None,
    recipe: RecipeName = None,
    keep: Keep = None,
    targets: TargetNames = None,
    untie: Untie = False,
    effort: Annotated[
        str | None,
        typer.Option(
            "--effort",
            help="With --keep and --calibrate: low, medium or high, how much time calibration takes. Default: medium.",
        ),
    ] = None,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help="With --keep: only MLPs become smaller, all by as many hidden units, and the result is a plain "
            "model that transformers alone loads.",
        ),
    ] = False,
    multiple: Multiple = None,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            "--calibrate",
            help=f"{OWN_TEXT_HELP} Again for more texts, which have equal shares of the tokens. Default: the recipe's; "
            "with --keep 'self'. 'none': data-free.",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            min=2,
            help="How many tokens of the calibration text. Default: the recipe's, or 24,000; 8,192 where neither a "
            "text nor a recipe is given.",
        ),
    ] = None,
    low_memory: Annotated[
        bool,
        typer.Option(
            "--low-memory",
            help="With --calibrate TEXT: hold one block of the model in memory at a time, and the rest on the disk. "
            "Default: where the weights are larger than half of the memory. The files are the same.",
        ),
    ] = False,
    dtype: Dtype = None,
    device: OneDevice = None,
    as_json: Json = False,
) -> None:
    """Fold a model and write the smaller one. Under torchrun, the processes divide the matrices among themselves.

    A calibrated fold by one process keeps finished blocks in OUT.fold until OUT is there; the same command resumes.
    """
    from tensorfold.calibration.own_text import SELF, check_named, documents_of, label_of
    from tensorfold.errors import InputError, TensorfoldError
    from tensorfold.folding.from_disk import MAX_SHARD_BYTES, fold_stream, model_facts
    from tensorfold.folding.in_memory import fold as fold_model
    from tensorfold.folding.out_of_core import fold_out_of_core
    from tensorfold.folding.plan import plan
    from tensorfold.folding.result import FoldReport
    from tensorfold.hf.loading import save
    from tensorfold.recipes.settings import CalibrateSettings
    from tensorfold.utils.atomic_files import check_target
    from tensorfold.utils.claims import claimed
    from tensorfold.utils.devices import one_device
    from tensorfold.utils.distributed import Ranks

    check_target(out)
    one_device(device, "a fold computes on one device; eval and sample take auto")
    elsewhere = device not in (None, "cpu")
    chosen = recipe_of(recipe, keep, targets, untie, effort, plain, multiple)
    unasked = not calibrate and recipe is None  # text is the default, since without any a model is ruined
    texts: Sequence[str] = [SELF] if unasked else calibrate or (chosen.calibrate.texts if chosen.calibrate else ())
    if "none" in texts:
        if len(texts) > 1:
            raise InputError("--calibrate none and another text: needed one of the two.")
        chosen, texts = chosen.without_text(), ()
    ranks = Ranks.find(cpu=True)
    with ranks.together():
        check_named(texts, "validation")
        source = source_of(model, chosen)
        tokenizer, absent = (source.tokenizer(), None) if texts and not unasked else source.tokenizer_beside()
        if unasked and tokenizer is None:
            texts = ()
        stream = None if texts or dtype or elsewhere else _stream(source, chosen)
        low = bool(texts) and _goes_by_blocks(low_memory, source, chosen, texts, dtype is not None or elsewhere)
        loaded = source.model(dtype and dtype.value, device) if stream is None and not low else None
        bar = sys.stderr.isatty()
        documents, reason = None, None
        if texts and stream is None:
            if SELF in texts and loaded is not None:
                plan(loaded, chosen)  # what cannot be folded is refused before the model writes
            tokens = tokens or (_UNASKED if unasked else (chosen.calibrate or CalibrateSettings()).tokens)
            try:
                documents = documents_of(texts, loaded, tokenizer, tokens, split="validation", progress=bar)
            except TensorfoldError as error:
                if not unasked:
                    raise
                texts, tokens, reason = (), None, str(error)

        def card(report: FoldReport) -> dict[str, Any]:
            label = f"{report.calibration_tokens} tokens of {label_of(texts, 'validation')}" if texts else None
            return model_facts(source, _label(recipe, keep, targets, untie, effort, plain, multiple), report, label)

        if stream is not None:
            report = fold_stream(stream, out, tokenizer, card, bar)
        elif low:
            assert documents is not None  # self is refused, and named texts raise
            report = fold_out_of_core(source, chosen, out, tokenizer, documents, tokens, card, MAX_SHARD_BYTES, bar)
        else:
            partial = Path(f"{out}.fold") if texts else None
            options: dict[str, Any] = {"calibration_tokens": tokens, "checkpoint": partial, "progress": bar}
            alone = partial is not None and ranks.count == 1  # several processes write no checkpoints
            with claimed(partial, "choose another --out") if alone and partial else nullcontext():
                report = fold_model(loaded, chosen, tokenizer, documents, **options)
                if ranks.is_first:
                    save(loaded, tokenizer, out, card(report))
                    if partial is not None:
                        shutil.rmtree(partial, ignore_errors=True)
    if ranks.is_first:
        if absent is not None:
            typer.echo(f"written without a tokenizer: {absent}", err=True)
        if unasked and not texts:
            typer.echo(f"folded without text, at a price in quality: {reason or 'there is no tokenizer'}", err=True)
        result = {**report.to_dict(), "out": str(out)}
        emit(as_json, result, lambda: f"{report}\nwritten to {out} in {report.seconds:.0f} s")
        if recipe is not None and chosen.eval is not None:
            typer.echo(f"to evaluate it as the recipe does: tensorfold eval {out} --recipe {recipe}", err=True)


def _stream(source: Source, recipe: Recipe) -> Stream | None:
    """The fold from disk to disk, where checkpoint and recipe allow it; None where the model has to be loaded."""
    from tensorfold.folding.from_disk import plan_stream
    from tensorfold.hf.on_disk import NotStoredError

    try:
        return plan_stream(source, recipe)
    except NotStoredError as error:
        log.debug("the model is loaded whole: %s", error)
        return None


def _goes_by_blocks(asked: bool, source: Source, recipe: Recipe, texts: Sequence[str], converts: bool) -> bool:
    """Whether a calibrated fold holds one block at a time: where it is asked for, or the memory is small and it can.

    Raises:
        InputError: It is asked for and cannot be done.
    """
    from tensorfold.calibration.own_text import SELF
    from tensorfold.errors import InputError
    from tensorfold.folding.out_of_core import check_out_of_core, is_large
    from tensorfold.hf.on_disk import NotStoredError

    if not asked and (SELF in texts or converts or not is_large(source)):
        return False
    if SELF in texts:
        raise InputError(
            "--low-memory: the model writes the calibration text itself, for which it has to be in memory; give a text "
            "with --calibrate TEXT."
        )
    if converts:
        raise InputError("--low-memory: weights go through as stored, on the CPU; leave out --dtype and --device.")
    try:
        check_out_of_core(source, recipe)
    except NotStoredError as error:
        if asked:
            raise InputError(f"--low-memory: {error} Fold without it, on a machine that holds the model.") from error
        log.warning("the model is held in memory: %s", error)
        return False
    return True


def _label(
    recipe: str | None,
    keep: float | None,
    targets: str | None,
    untie: bool,
    effort: str | None,
    plain: bool,
    multiple: int | None,
) -> str:
    """The options that a model was folded with, for its card."""
    given = recipe if recipe is not None else f"--keep {keep} --targets {'mlp' if targets is None else targets}"
    given = f"{given} --effort {effort}" if effort else given
    given = f"{given} --multiple {multiple}" if multiple else given
    return given + " --plain" * plain + " --untie" * untie
