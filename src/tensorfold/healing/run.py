"""One healing run: block-by-block and end-to-end training, and the choice of the weights to keep."""

from __future__ import annotations

import copy
import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tensorfold.algebra.precision import autocast
from tensorfold.data.seen_text import note
from tensorfold.data.token_cache import TokenCache
from tensorfold.errors import InputError, pass_on_memory
from tensorfold.healing.blockwise import heal_blocks
from tensorfold.healing.checkpoints import damage, newest, sealed
from tensorfold.healing.log import Reporter, StepLog
from tensorfold.healing.logit_losses import cross_entropy
from tensorfold.healing.losses import HealLoss
from tensorfold.healing.report import HealReport
from tensorfold.healing.seen import blockwise_order, seen_by_healing
from tensorfold.healing.setup import arguments, choose_trained, micro_batch, uses_fsdp, validation_subset
from tensorfold.healing.start import Start, as_before, round_to
from tensorfold.healing.sweep import with_best_rate
from tensorfold.healing.trainer import HealTrainer, own_tensors, read_state
from tensorfold.models.anatomy import count_parameters
from tensorfold.models.modes import evaluation_mode
from tensorfold.models.sizes import stored_bytes
from tensorfold.recipes.settings import HealSettings

log = logging.getLogger(__name__)


class Run:
    """One healing run in its working directory.

    Args:
        model: The student, changed in place.
        teacher: The dense model; None without any.
        settings: Settings of the run.
        cache: The training text as tokens.
        work: The working directory.
        state: The processes of the run.
        progress: Show progress bars.
        report_to: Reporters of the Trainer.
    """

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
        """Heal; return the report, and the model that holds the result (a copy where the given one is sharded)."""
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
        """Restore the weights that the model came with, unless it is sharded."""
        if not self.sharded:
            with suppress(OSError, SafetensorError):  # the disk may be what failed
                self._start.give(self.model)

    def _healed(self) -> tuple[HealReport, PreTrainedModel]:
        """Train, and decide which weights to keep; where those before healing are best, they are not yet restored."""
        settings = self.settings
        dtypes = {id(parameter): parameter.dtype for parameter in self.model.parameters()}
        self.model.to(torch.float32)  # type: ignore[arg-type]
        trained = sum(parameter.numel() for parameter in choose_trained(self.model, settings))
        if settings.steps:
            # A loss that cannot be computed is refused now, not after hours of block-by-block healing.
            HealLoss(settings, self.model, self.teacher).close()
        blockwise, before = self._blocks() if settings.blockwise_tokens else (None, None)
        if blockwise is not None and not settings.steps:
            trained = blockwise["parameters"]
        result, done, step, loss, kept = self.model, 0, 0, None, "blocks"
        if settings.steps:
            result, done, step, loss, first = with_best_rate(self).end_to_end()
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
        """Heal block by block on the main process, and load the result on every process from its directory.

        Returns:
            The report as JSON values, and the validation loss before.
        """
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
        """The mean cross-entropy on the validation windows; None without any.

        It is computed as the Trainer does, batch by batch, so that equal weights give equal digits.
        """
        if self.validation is None:
            return None
        losses = []
        device = self.model.device
        size = micro_batch(self.settings, self.state.num_processes)
        with (
            evaluation_mode(self.model),
            autocast(device.type, torch.bfloat16 if self.settings.precision == "bf16" else None),
        ):
            for first in range(0, len(self.validation), size):
                windows = [self.validation[index] for index in range(first, min(first + size, len(self.validation)))]
                ids, labels = (torch.stack([each[k] for each in windows]).to(device) for k in ("input_ids", "labels"))
                loss = cross_entropy(self.model(input_ids=ids, use_cache=False).logits, labels)
                losses.append(loss.cpu().repeat(len(windows)))
        return float(torch.cat(losses).numpy().mean())

    def end_to_end(self) -> tuple[PreTrainedModel, int, int, float | None, float | None]:
        """Train end to end, from the newest checkpoint where there is one.

        Returns:
            The model; the steps taken; the step whose weights are kept; the validation loss at that step; and that at
            step 0. Where step 0 is kept without block-by-block healing, the model still has the last step's weights.
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
        # A model that FSDP has sharded cannot be saved; this copy takes the gathered weights in the end.
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
