"""Healing from beginning to end: text, blocks, the whole model, and what is left on disk."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import tensorfold
from tensorfold.data.seen_text import note
from tensorfold.data.token_cache import TokenCache
from tensorfold.data.tokens import check_tokenizer
from tensorfold.errors import InputError, TensorfoldError, pass_on_memory
from tensorfold.healing.blockwise import heal_blocks
from tensorfold.healing.checkpoints import begin, clear, damage, digest, fingerprint, holds_work, newest, sealed
from tensorfold.healing.given import check_reporters, check_student, checked_settings, source_of, tokens_of
from tensorfold.healing.log import Reporter, StepLog
from tensorfold.healing.losses import HealLoss, cross_entropy
from tensorfold.healing.report import HealReport, card_of, finished, write
from tensorfold.healing.seen import blockwise_order, seen_by_healing, selected_on
from tensorfold.healing.setup import arguments, choose_trained, micro_batch, uses_cpu, uses_fsdp, validation_subset
from tensorfold.healing.start import Start, as_before, round_to
from tensorfold.healing.trainer import HealTrainer, own_tensors, read_state
from tensorfold.hf.sources import find_model
from tensorfold.models.anatomy import count_parameters
from tensorfold.models.modes import evaluation_mode
from tensorfold.models.sizes import stored_bytes
from tensorfold.recipes.settings import HealSettings
from tensorfold.utils.atomic_files import check_place, check_target, claimed, is_disk_full
from tensorfold.utils.distributed import PATIENCE
from tensorfold.utils.torch_modes import in_usual_modes
from tensorfold.utils.validation import check_types

log = logging.getLogger(__name__)


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
    """Recover the quality of a folded model, in place: block by block if asked for, then end to end.

    Unless ``select="last"`` asks for it, the result is never worse on the validation split than what came in, which is
    given back where nothing was better; the report's ``kept`` and ``helped`` say so.

    With ``out`` the run can be killed at any moment: checkpoints, each whole and with its checksums, and the log are
    kept in the sibling directory ``OUT.heal``; the same call goes on from the last one, and ``OUT.heal`` disappears
    when ``OUT`` is there. Calling again after that returns the report of what ``OUT`` holds.

    Args:
        model: A transformers causal language model. Under FSDP it stays sharded, and the result is in ``out`` alone.
        text: A ``str`` or path is a TEXT: a file, directory or name. A list of ``pathlib.Path`` is several of them, one
            after the other. A list of ``str`` is documents, as ``fold`` takes them. None: the settings' TEXT.
        teacher: The dense model, or its name; without a teacher term in the settings it means ``kl=1``.
        tokenizer: The model's; looked for beside it if None.
        settings: All of them; ``overrides`` replaces single ones.
        out: Directory to write, with ``heal.jsonl`` (a line a step) and ``loss.svg`` beside the model.
        card: What the README reports, to which ``heal`` is added; the model's own if None.
        report_to: ``tensorboard``, ``wandb`` or what else transformers' ``Trainer`` knows. TensorBoard's files go to
            ``OUT.runs`` unless ``TENSORBOARD_LOGGING_DIR`` is set.

    Raises:
        InputError: Models, text or settings cannot be used, or ``OUT.heal`` holds a run that was begun otherwise.
            Nothing is left of what the call had written.
        TensorfoldError: The disk is full, or the loss became NaN; checkpoints are intact.
        Exception: Any other; with all of them the model has the weights that it came with, unless it is sharded.
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
        raise InputError("heal: several processes and no out; needed a directory that all of them can write.")
    if target is not None and card_of(target).get("heal") is None:
        check_target(target)
    source = source_of(settings.text if text is None else text)
    tokenizer = tokenizer or find_model(model.name_or_path).tokenizer()
    dense = find_model(teacher).model() if isinstance(teacher, str) else teacher
    cache = tokens_of(source, tokenizer, [model] if dense is None else [model, dense], settings, state)
    identity = {
        # Neither changes a single weight.
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
        if target is not None and card_of(target).get("heal") is not None:  # by another process, in the meantime
            return finished(target, identity, model)
        if state.is_main_process:
            begin(work, identity, write=True)
        state.wait_for_everyone()
        run = _Run(model, dense, settings, cache, work, state, progress, report_to)
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


class _Run:
    """One healing run in its working directory."""

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None,
        settings: HealSettings,
        cache: TokenCache,
        work: Path,
        state: PartialState,
        progress: bool,
        report_to: str | list[str],
    ) -> None:
        self.model, self.teacher, self.settings, self.cache = model, teacher, settings, cache
        self.work, self.state, self.report_to = work, state, report_to
        self.progress = progress and state.is_main_process
        self.sharded = uses_fsdp() and state.num_processes > 1
        self.validation = validation_subset(cache.validation, settings) if len(cache.validation) else None
        if settings.patience is not None and self.validation is None:
            raise InputError("heal: patience needs a validation split; give more text, or validation_fraction above 0.")
        self._start = Start(model, work / "start", state)
        self.log = StepLog(work / "log.jsonl") if state.is_main_process else None

    def whole(self) -> tuple[HealReport, PreTrainedModel]:
        """Heal, and return the report and the model that holds the result."""
        with as_before(self.model, restore=not self.sharded):
            report, result = self._healed()
        if report.kept == "start" and (self.state.is_main_process or not self.sharded):
            self._start.give(result)
        if report.helped is False:
            said = str(report).splitlines()[0]
            log.warning("heal: %s", said)
            if self.log is not None:
                self.log.write_once({"step": report.step, "kept": report.kept, "helped": False})
        seen = seen_by_healing(self.cache, self.settings, self.validation, report.kept, report.steps)
        note(self.model, seen)
        if result is not self.model:
            note(result, seen)
        return report, result

    def undo(self) -> None:
        """Give the model the weights that it came in with, unless it is sharded."""
        if not self.sharded:
            with suppress(OSError, SafetensorError):  # what ended the run may have taken the disk along
                self._start.give(self.model)

    def _healed(self) -> tuple[HealReport, PreTrainedModel]:
        """Train, and find out which state is best; of what came in, only that it is."""
        settings = self.settings
        dtypes = {id(parameter): parameter.dtype for parameter in self.model.parameters()}
        self.model.to(torch.float32)  # type: ignore[arg-type]
        trained = sum(parameter.numel() for parameter in choose_trained(self.model, settings))
        if settings.steps:
            # What the loss refuses is refused before blocks are healed for hours.
            HealLoss(settings, self.model, self.teacher).close()
        blockwise, before = self._blocks() if settings.blockwise_tokens else (None, None)
        if blockwise is not None and not settings.steps:
            trained = blockwise["parameters"]
        result, done, step, loss, kept = self.model, 0, 0, None, "blocks"
        if settings.steps:
            result, done, step, loss, first = self._end_to_end()
            before = first if before is None else before
            kept = "steps" if step else "blocks" if blockwise else "start"
        rounded = kept != "start" and not self.sharded and round_to(result, dtypes)
        if rounded or not settings.steps:
            loss = self._validate()
        helped = None if loss is None or before is None else loss < before
        if helped is False and settings.select == "best":
            kept, step, loss = "start", 0, before
        report = HealReport(
            steps=done,
            step=step,
            tokens=done * settings.batch * settings.block,
            validation_loss_before=before,
            validation_loss=loss,
            text=self.cache.label,
            seconds=0.0,
            parameters=count_parameters(result),
            bytes=stored_bytes(result),
            trained_parameters=trained,
            blockwise=blockwise,
            kept=kept,
            helped=helped,
            window=settings.block,
            prefix=self.cache.prefix,
        )
        return report, result

    def _blocks(self) -> tuple[dict[str, Any], float | None]:
        """Heal block by block on the main process; the result is a sealed directory, which every process reads."""
        done = self.work / "blocks"
        if self.state.is_main_process and damage(done) is not None:
            assert self.log is not None
            assert self.teacher is not None
            for model in (self.model, self.teacher):
                model.to(self.state.device)  # type: ignore[arg-type]
            before, blocks = self._validate(), self.cache.train
            report = heal_blocks(
                self.model,
                self.teacher,
                torch.stack([blocks[index]["input_ids"] for index in blockwise_order(self.cache, self.settings)]),
                self.settings,
                checkpoint=self.work / "blockwise",
                on_step=lambda step: self.log.write({"stage": "blockwise", **step}),  # type: ignore[union-attr]
                progress=self.progress,
            )
            with sealed(done) as partial:
                save_file(own_tensors(self.model), partial / "model.safetensors")
                summary = {"report": report.to_dict(), "before": before}
                (partial / "report.json").write_text(json.dumps(summary), encoding="utf-8")
        self.state.wait_for_everyone()
        self.model.load_state_dict(load_file(done / "model.safetensors"), strict=False)
        summary = json.loads((done / "report.json").read_text(encoding="utf-8"))
        return summary["report"], summary["before"]

    @torch.no_grad()
    def _validate(self) -> float | None:
        """Mean cross-entropy on the validation windows, as the Trainer measures it; None without any."""
        if self.validation is None:
            return None
        losses = []
        device = self.model.device
        with (
            evaluation_mode(self.model),
            torch.autocast(device.type, torch.bfloat16, self.settings.precision == "bf16"),
        ):
            for index in range(len(self.validation)):
                ids, labels = (self.validation[index][key][None].to(device) for key in ("input_ids", "labels"))
                losses.append(cross_entropy(self.model(input_ids=ids, use_cache=False).logits, labels).item())
        return sum(losses) / len(losses)

    def _end_to_end(self) -> tuple[PreTrainedModel, int, int, float | None, float | None]:
        """The healed model, the steps taken, the one whose weights it has, its validation loss, and that of step 0.

        At step 0 without blocks the weights are still those of the last step.
        """
        settings, main = self.settings, self.state.is_main_process
        found = [str(newest(self.work) or "")] if main else [""]
        if self.state.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(found)
        resume = Path(found[0]) if found[0] else None
        reporters = []
        if self.log is not None:
            self.log.forget_after(read_state(resume)["global_step"] if resume else -1)
            reporters = [Reporter(self.log, settings.batch * settings.block, settings.dropout, self.progress)]
        plan = arguments(settings, self.work, self.state.num_processes, self.validation is not None, self.report_to)
        plan.eval_on_start = resume is None and self.validation is not None
        # What FSDP has sharded cannot be written as a model; this copy takes the gathered weights in the end.
        shell = copy.deepcopy(self.model) if self.sharded and main else None
        if self.teacher is not None:
            self.teacher.to(plan.device)  # type: ignore[arg-type]
        loss = HealLoss(settings, self.model.to(plan.device), self.teacher)  # type: ignore[arg-type]
        low, high = loss.noise.of_configuration
        if high:
            log.info("heal: dropout %g instead of the model's %s", settings.dropout, f"{low:g} to {high:g}")
        try:
            try:
                text = self.cache.train if settings.windows == "packed" else self.cache.train_anywhere
                trainer = HealTrainer(self.model, plan, settings, loss, text, self.validation, reporters)
            except (ImportError, RuntimeError, ValueError) as error:
                pass_on_memory(error)
                raise InputError(f"heal: the Trainer refuses these settings: {error}") from error
            try:
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
                last = trainer.state.global_step
                best = trainer.state.best_global_step
                step = last if settings.select == "last" or best is None else best
                if 0 < step < last:
                    trainer.load_step(self.work / f"checkpoint-{step}")
                gathered = trainer.accelerator.get_state_dict(trainer.model) if self.sharded else None
            finally:
                trainer.plain_model()
                for reporter in reporters:
                    reporter.bar.stop()
        finally:
            loss.close()
        losses = {each["step"]: each["eval_loss"] for each in trainer.state.log_history if "eval_loss" in each}
        result = shell or self.model
        if shell is not None and step:
            assert gathered is not None
            shell.load_state_dict(gathered)
        elif not step and settings.blockwise_tokens and not self.sharded:
            result.load_state_dict(load_file(self.work / "blocks" / "model.safetensors"), strict=False)
        return result, last, step, losses.get(step), losses.get(0)


@contextmanager
def _workplace(target: Path | None, state: PartialState) -> Iterator[Path]:
    """``OUT.heal``, claimed by the main process, or a temporary directory.

    A run that is refused leaves it as it was found: what an earlier run had finished in it stays, and nothing else.
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
    """Name ``OUT.runs`` to TensorBoard where its directory is not set."""
    name = "TENSORBOARD_LOGGING_DIR"
    if target is None or report_to == "none" or name in os.environ:
        yield
        return
    os.environ[name] = f"{target}.runs"
    try:
        yield
    finally:
        os.environ.pop(name, None)
