"""Healing from beginning to end: text, blocks, the whole model, and what is left on disk."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import tensorfold
from tensorfold import texts
from tensorfold.anatomy import context_length, count_parameters
from tensorfold.cache import check_place, check_target, claimed, is_disk_full
from tensorfold.errors import InputError, TensorfoldError
from tensorfold.healing.blockwise import heal_blocks
from tensorfold.healing.checkpoints import begin, damage, digest, fingerprint, newest, sealed
from tensorfold.healing.data import TokenCache
from tensorfold.healing.documents import Memory, Source
from tensorfold.healing.end_to_end import (
    HealTrainer,
    RunOrder,
    arguments,
    choose_trained,
    micro_batch,
    own_tensors,
    read_state,
    uses_cpu,
    uses_fsdp,
    validation_subset,
)
from tensorfold.healing.log import Reporter, StepLog
from tensorfold.healing.losses import HealLoss, cross_entropy
from tensorfold.healing.outcome import HealReport, card_of, finished, write
from tensorfold.hf.plain import check_floating
from tensorfold.hf.sources import find_model
from tensorfold.ranks import PATIENCE
from tensorfold.settings import HealSettings
from tensorfold.strict import check_keys, check_types
from tensorfold.tokens import check_tokenizer


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
        TensorfoldError: The disk is full, or the loss became NaN; checkpoints are intact.
    """
    started = time.monotonic()
    settings = _settings(settings, overrides, teacher is not None)
    if teacher is model:
        raise InputError("heal: the teacher is the model itself; needed the dense model, loaded separately.")
    if settings.needs_teacher and teacher is None:
        raise InputError("heal: the settings compare with a teacher, and none was given; name the dense model.")
    check_types("heal", model=(model, PreTrainedModel), out=(out, str | os.PathLike | None))
    check_types("heal", teacher=(teacher, PreTrainedModel | str | None), settings=(settings, HealSettings | None))
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    check_floating(model)
    state = PartialState(cpu=uses_cpu(), timeout=PATIENCE)
    micro_batch(settings, state.num_processes)
    _check_reporters(report_to)
    if out is not None:
        check_place(Path(out))
    target = None if out is None else Path(out).resolve()
    if target is None and state.num_processes > 1:
        raise InputError("heal: several processes and no out; needed a directory that all of them can write.")
    if target is not None and card_of(target).get("heal") is None:
        check_target(target)
    source = _source(settings.text if text is None else text)
    tokenizer = tokenizer or find_model(model.name_or_path).tokenizer()
    dense = find_model(teacher).model() if isinstance(teacher, str) else teacher
    cache = _tokens(source, tokenizer, model, settings, state)
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
        if target is not None and report_to != "none":
            os.environ.setdefault("TENSORBOARD_LOGGING_DIR", f"{target}.runs")
        run = _Run(model, dense, settings, cache, work, state, progress, report_to)
        try:
            report, result = run.whole()
            report = dataclasses.replace(
                report, seconds=time.monotonic() - started, out=None if target is None else str(out)
            )
            if target is not None and state.is_main_process:
                done = {
                    **report.to_dict(),
                    "settings": identity["settings"],
                    "identity": digest(identity),
                    "previous": before.get("heal"),
                }
                write(target, work, result, tokenizer, {**before, "heal": done, "tensorfold": tensorfold.__version__})
        except OSError as error:
            if is_disk_full(error):
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
        self.log = StepLog(work / "log.jsonl") if state.is_main_process else None

    def whole(self) -> tuple[HealReport, PreTrainedModel]:
        """Heal, and return the report and the model that holds the result."""
        settings = self.settings
        with _as_before(self.model, restore=not self.sharded):
            self.model.to(torch.float32)  # type: ignore[arg-type]
            trained = sum(parameter.numel() for parameter in choose_trained(self.model, settings))
            blockwise, before = self._blocks() if settings.blockwise_tokens else (None, None)
            if blockwise is not None and not settings.steps:
                trained = blockwise["parameters"]
            result, done, step, loss = self.model, 0, 0, None
            if settings.steps:
                result, done, step, loss, start = self._end_to_end()
                before = start if before is None else before
            elif self.validation is not None:
                loss = self._validate()
        report = HealReport(
            steps=done,
            step=step,
            tokens=done * settings.batch * settings.block,
            validation_loss_before=before,
            validation_loss=loss,
            text=self.cache.label,
            seconds=0.0,
            parameters=count_parameters(result),
            trained_parameters=trained,
            blockwise=blockwise,
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
            before = self._validate() if self.validation is not None else None
            report = heal_blocks(
                self.model,
                self.teacher,
                self._windows(),
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

    def _windows(self) -> torch.Tensor:
        blocks = self.cache.train
        count = min(len(blocks), max(1, self.settings.blockwise_tokens // self.settings.block))
        return torch.stack([blocks[index]["input_ids"] for index in RunOrder(len(blocks), count, self.settings.seed)])

    @torch.no_grad()
    def _validate(self) -> float:
        assert self.validation is not None
        self.model.eval()
        losses = []
        for index in range(len(self.validation)):
            ids = self.validation[index]["input_ids"][None].to(self.model.device)
            losses.append(cross_entropy(self.model(input_ids=ids, use_cache=False).logits, ids).item())
        return sum(losses) / len(losses)

    def _end_to_end(self) -> tuple[PreTrainedModel, int, int, float | None, float | None]:
        """The healed model, the steps taken, the one whose weights it has, its validation loss, and the first one."""
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
        try:
            try:
                text = self.cache.train if settings.windows == "packed" else self.cache.train_anywhere
                trainer = HealTrainer(self.model, plan, settings, loss, text, self.validation, reporters)
            except (ImportError, RuntimeError, ValueError) as error:
                raise InputError(f"heal: the Trainer refuses these settings: {error}") from error
            try:
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
                last = trainer.state.global_step
                step = (settings.select == "best" and trainer.state.best_global_step) or last
                if step != last:
                    trainer.load_step(self.work / f"checkpoint-{step}")
                gathered = trainer.accelerator.get_state_dict(trainer.model) if self.sharded else None
            finally:
                trainer.plain_model()
                for reporter in reporters:
                    reporter.bar.stop()
        finally:
            loss.close()
        if shell is not None:
            assert gathered is not None
            shell.load_state_dict(gathered)
        start = (
            None if self.log is None else next((r["validation_loss"] for r in self.log.records if r["step"] == 0), None)
        )
        reached = next((each["eval_loss"] for each in trainer.state.log_history if each["step"] == step), None)
        return shell or self.model, last, step, reached, start


@contextmanager
def _workplace(target: Path | None, state: PartialState) -> Iterator[Path]:
    """``OUT.heal``, claimed by the main process, or a temporary directory."""
    if target is None:
        with tempfile.TemporaryDirectory() as directory:
            yield Path(directory)
        return
    work = Path(f"{target}.heal")
    with claimed(work, "choose another --out") if state.is_main_process else nullcontext():
        yield work


def _check_reporters(report_to: str | list[str]) -> None:
    """Raise :class:`InputError` for what the Trainer would refuse only after the blocks are healed."""
    from transformers.integrations import get_available_reporting_integrations

    check_types("heal", report_to=(report_to, str | list))
    known = ["none", "all", *get_available_reporting_integrations()]
    for name in [report_to] if isinstance(report_to, str) else report_to:
        if name not in known:
            raise InputError(
                f"heal: the Trainer refuses these settings: report_to={name!r:.100} is unknown or not installed; "
                f"needed one of {', '.join(known)}."
            )


def _settings(settings: HealSettings | None, overrides: Mapping[str, Any], teacher: bool) -> HealSettings:
    check_keys("heal", dict(overrides), [field.name for field in dataclasses.fields(HealSettings)])
    settings = dataclasses.replace(settings or HealSettings(), **overrides)
    if not (settings.steps or settings.blockwise_tokens):
        raise InputError("heal: steps=0 and blockwise_tokens=0 leave nothing to do; set one of them.")
    if teacher and not settings.needs_teacher:
        settings = dataclasses.replace(settings, kl=1.0)
    return settings


def _source(text: Any) -> Source:
    """What to tokenise: see ``text`` of :func:`heal`."""
    if isinstance(text, str | os.PathLike):
        return text
    items = list(text) if isinstance(text, Sequence) else []
    if items and all(isinstance(item, os.PathLike) for item in items):
        return items
    if not items or not all(isinstance(item, str) for item in items):
        raise InputError(f"heal: text={text!r:.80}; needed a TEXT, a list of paths to texts, or a list of documents.")
    return Memory(f"{len(items)} documents", tuple(items))


def _tokens(
    source: Source, tokenizer: Any, model: PreTrainedModel, settings: HealSettings, state: PartialState
) -> TokenCache:
    limit = context_length(model.config)
    if limit is not None and settings.block > limit:
        raise InputError(f"heal: block={settings.block}; needed at most the {limit} positions of the model.")
    vocabulary = model.config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise InputError(
            f"heal: the tokenizer has {len(tokenizer)} tokens, the model {vocabulary}; give the model's own tokenizer."
        )
    names = [source] if isinstance(source, str | os.PathLike) else [] if isinstance(source, Memory) else source
    hub = [texts.locate(os.fspath(name), "train").dataset for name in names]
    most = None
    if any(dataset is not None and dataset.first is not None for dataset in hub):
        # Of a data set of billions of tokens, what the run can use; a power of two, so that few caches serve all runs.
        used = settings.steps * settings.batch * settings.block + settings.blockwise_tokens
        most = 1 << (int(used / (1 - settings.validation_fraction)) + 2 * settings.block).bit_length()
    with state.main_process_first():
        return TokenCache.build(
            source,
            tokenizer,
            settings.block,
            validation_fraction=settings.validation_fraction,
            workers=max(1, settings.workers),
            max_tokens=most,
        )


@contextmanager
def _as_before(model: PreTrainedModel, restore: bool) -> Iterator[None]:
    """Give back what training changes besides the weights: precision, place, mode, cache, what requires gradients."""
    place, dtype, mode = model.device, model.dtype, model.training
    cached = model.config.use_cache
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        model.config.use_cache = cached
        if restore:
            for parameter, required in trained:
                parameter.requires_grad_(required)
            model.to(place, dtype).train(mode)  # type: ignore[call-overload]
