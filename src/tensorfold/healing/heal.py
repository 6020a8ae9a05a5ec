"""Healing from beginning to end: training text, block-by-block and end-to-end training, and what is written to disk."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel

import tensorfold
from tensorfold.data.tokens import check_tokenizer
from tensorfold.errors import InputError, TensorfoldError
from tensorfold.healing.checkpoints import begin, clear, digest, fingerprint, holds_work
from tensorfold.healing.device import uses_cpu
from tensorfold.healing.given import (
    check_reporters,
    check_student,
    checked_settings,
    source_of,
    tokens_of,
    with_own_text,
)
from tensorfold.healing.report import HealReport, card_of, finished, write
from tensorfold.healing.run import Run
from tensorfold.healing.seen import selected_on
from tensorfold.healing.setup import micro_batch
from tensorfold.hf.sources import find_model
from tensorfold.recipes.settings import HealSettings
from tensorfold.utils.atomic_files import check_place, check_target, is_disk_full
from tensorfold.utils.claims import claimed
from tensorfold.utils.distributed import PATIENCE
from tensorfold.utils.torch_modes import in_usual_modes
from tensorfold.utils.validation import check_types


@in_usual_modes
def heal(
    model: PreTrainedModel,
    text: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    teacher: PreTrainedModel | str | None = None,
    *,
    tokenizer: Any = None,
    settings: HealSettings | None = None,
    out: str | os.PathLike[str] | None = None,
    card: Mapping[str, Any] | None = None,
    progress: bool = False,
    report_to: str | list[str] = "none",
    **overrides: Any,
) -> HealReport:
    """Train a folded model to recover its quality, in place: block by block if asked for, then end to end.

    Unless ``select="last"`` asks for it, the result is never worse on the validation split than the model that was
    given: where nothing was better, its weights are restored. The report's ``kept`` and ``helped`` say so.

    With ``out`` the run can be killed at any moment. Checkpoints, each whole and with checksums, and the log are kept
    in the sibling directory ``OUT.heal`` until ``OUT`` is written; the same call resumes from the last checkpoint. Once
    ``OUT`` is there, the same call returns its report.

    Args:
        model: A causal language model of transformers. Under FSDP it stays sharded, and the result is in ``out`` alone.
        text: A ``str`` or path names a text: a file, a directory, a named text, or ``"self"`` for text that the teacher
            writes (without one, the model). A list of ``pathlib.Path``, with ``"self"`` among them or not, names
            several, one after the other. A list of ``str`` holds the documents themselves, as ``fold`` takes them. None
            for the text that the settings name.
        teacher: The dense model, or its name. Where no term of the loss compares with it, ``kl`` is 1.
        tokenizer: The model's tokenizer; looked for beside the model if None.
        settings: All settings; the defaults if None.
        out: Directory to write, with ``heal.jsonl`` (a line a step) and ``loss.svg`` beside the model.
        card: Facts for the model's card, to which ``heal`` is added; the model's own card if None.
        progress: Show progress bars on standard error.
        report_to: ``tensorboard``, ``wandb`` or any other reporter of transformers' ``Trainer``. TensorBoard's files go
            to ``OUT.runs`` unless ``TENSORBOARD_LOGGING_DIR`` is set.
        overrides: Single settings by name, in place of those in ``settings``.

    Returns:
        The report, with losses before and after.

    Raises:
        InputError: Models, text or settings cannot be used, or ``OUT.heal`` holds a run with another identity. What the
            call had written is removed.
        TensorfoldError: The disk is full, or the loss became NaN; checkpoints are intact.
        Exception: Any other failure. After every one of them the model has the weights that it came with, unless it is
            sharded.
    """
    started = time.monotonic()
    if card is not None and out is None:
        raise InputError("heal: card has no effect here; it needs out, whose README reports it.")
    settings = checked_settings(settings, overrides, teacher is not None)
    if settings.needs_teacher and teacher is None:
        raise InputError("heal: the settings compare with a teacher, and none was given; name the dense model.")
    check_types("heal", model=(model, PreTrainedModel), out=(out, str | os.PathLike | None))
    check_types("heal", teacher=(teacher, PreTrainedModel | str | None), settings=(settings, HealSettings | None))
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    check_student(model, teacher)
    state = PartialState(cpu=uses_cpu(), timeout=PATIENCE)
    micro_batch(settings, state.num_processes)
    check_reporters(report_to)
    if out is not None:
        check_place(Path(out))
    target = None if out is None else Path(out).resolve()
    if target is None and state.num_processes > 1:
        raise InputError("heal: got several processes and no out; needed a directory that all of them can write.")
    if target is not None and card_of(target).get("heal") is None:
        check_target(target)
    source = source_of(settings.text if text is None else text)
    tokenizer = tokenizer or find_model(model.name_or_path).tokenizer()
    dense = find_model(teacher).model() if isinstance(teacher, str) else teacher
    with state.main_process_first():
        source = with_own_text(source, model if dense is None else dense, tokenizer, settings, progress)
    cache = tokens_of(source, tokenizer, [model] if dense is None else [model, dense], settings, state)
    identity = {
        # The settings text and workers are left out: neither changes a weight, and the text's own key is below.
        "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("text", "workers")},
        "text": cache.key,
        "student": fingerprint(model),
        "teacher": None if dense is None else fingerprint(dense),
        "processes": state.num_processes,
    }
    before = dict(card_of(Path(model.name_or_path)) if card is None else card)
    if target is not None and card_of(target).get("heal") is not None:
        return finished(target, identity, model)

    with _workplace(target, state) as work:
        if target is not None and card_of(target).get("heal") is not None:  # another process has finished it meanwhile
            return finished(target, identity, model)
        if state.is_main_process:
            begin(work, identity, write=True)
        state.wait_for_everyone()
        run = Run(model, dense, settings, cache, work, state, progress, report_to)
        try:
            with _tensorboard_beside(target, report_to):
                report, result = run.whole()
            written = None if target is None else str(out)
            report = dataclasses.replace(report, seconds=time.monotonic() - started, out=written)
            if target is not None and state.is_main_process:
                done = {
                    **report.to_dict(),
                    "settings": identity["settings"],
                    "identity": digest(identity),
                    "selected_on": selected_on(cache, settings, run.validation),
                    "previous": before.get("heal"),
                }
                write(target, work, result, tokenizer, {**before, "heal": done, "tensorfold": tensorfold.__version__})
        except BaseException as error:
            run.undo()
            if isinstance(error, OSError) and is_disk_full(error):
                raise TensorfoldError(
                    f"The disk is full at {work}; the checkpoints in it are intact. Make room, then run the same "
                    "command again."
                ) from error
            raise
        state.wait_for_everyone()
    return report


@contextmanager
def _workplace(target: Path | None, state: PartialState) -> Iterator[Path]:
    """Yield the working directory: ``OUT.heal``, locked by the main process, or a temporary one without ``OUT``.

    After an :class:`InputError` the directory is emptied, unless a run can be resumed from what it held at first.
    """
    if target is None:
        with tempfile.TemporaryDirectory() as directory:
            yield Path(directory)
        return
    work = Path(f"{target}.heal")
    missing = [folder for folder in work.parents if not folder.exists()]
    try:
        with claimed(work, "choose another --out") if state.is_main_process else nullcontext():
            empty = state.is_main_process and not holds_work(work)
            try:
                yield work
            except InputError:
                if empty:
                    clear(work)
                raise
    except InputError:
        for folder in missing if state.is_main_process else ():
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def _tensorboard_beside(target: Path | None, report_to: str | list[str]) -> Iterator[None]:
    """Point TensorBoard to ``OUT.runs`` for the ``with`` block, unless its directory is set already."""
    name = "TENSORBOARD_LOGGING_DIR"
    if target is None or report_to == "none" or name in os.environ:
        yield
        return
    os.environ[name] = f"{target}.runs"
    try:
        yield
    finally:
        os.environ.pop(name, None)
