"""The ``Trainer`` of transformers with the loss, the order of windows and the checkpoints of healing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, broadcast_object_list
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from tensorfold.data.windows import TokenWindows
from tensorfold.errors import TensorfoldError
from tensorfold.healing.checkpoints import STATE, rotate, sealed
from tensorfold.healing.logit_losses import cross_entropy
from tensorfold.healing.losses import HealLoss
from tensorfold.healing.setup import RunOrder, uses_fsdp
from tensorfold.hf.sharding import as_accelerate_takes_it
from tensorfold.recipes.settings import HealSettings


class HealTrainer(Trainer):
    """The training loop of end-to-end healing.

    It minimises :class:`HealLoss` over windows in the order of :class:`RunOrder`, and writes checkpoints that are whole
    and have checksums. Validation is the cross-entropy of held-out windows, whatever the training loss; the best step
    by it is checkpointed, unless it is the state before the first step.

    Args:
        model: The student.
        args: Arguments of the Trainer, see :func:`tensorfold.healing.setup.arguments`.
        settings: Settings of the run.
        loss: The loss.
        train: Windows to train on.
        validation: Windows to validate on; None for none.
        callbacks: Callbacks of the Trainer.
    """

    # Each micro-batch gives a mean over equally many tokens; the Trainer divides their sum by their number.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        settings: HealSettings,
        loss: HealLoss,
        train: TokenWindows,
        validation: Subset[dict[str, Tensor]] | None,
        callbacks: list[TrainerCallback],
    ) -> None:
        self.settings, self.heal_loss = settings, loss
        self._parts: dict[str, Tensor] = {}
        self._right: list[Tensor] = []
        self._writing: Path | None = None
        super().__init__(model, args, train_dataset=train, eval_dataset=validation, callbacks=callbacks)
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, and turn FSDP on where it was configured for processes on CPUs."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        # accelerate reads the configuration of FSDP on accelerators only, and would train with DDP on CPUs instead.
        if state.distributed_type == DistributedType.MULTI_CPU and uses_fsdp():
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            # Set twice: for this object, and for objects that are made from the shared state later.
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def _get_train_sampler(self, train_dataset: Any = None) -> RunOrder:
        settings = self.settings
        length = settings.steps * settings.batch
        return RunOrder(len(self.train_dataset), length, settings.seed, draws=settings.windows == "random")

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters with weight decay: matrices and cores, but no vectors (biases, norms, scalars)."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with as_accelerate_takes_it(self.model if self.is_fsdp_enabled else None):
            return super()._prepare_for_training(*args, **kwargs)

    def _init_training_state(self, max_steps: int, per_epoch: int, epochs: int, *rest: Any) -> tuple[int, int]:
        trained = super()._init_training_state(max_steps, per_epoch, epochs, *rest)
        # A resumed run that patience had ended already takes no further step.
        return (epochs, 0) if self._out_of_patience() else trained

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one micro-batch; its terms are added up for the step's log."""
        loss, parts = self.heal_loss(model, self._teach, inputs["input_ids"], inputs.get("labels"))
        for name, part in parts.items():
            self._parts[name] = self._parts.get(name, 0) + part / self.current_gradient_accumulation_steps
        return (loss, None) if return_outputs else loss

    def _teach(self, **inputs: Any) -> Any:
        assert self.heal_loss.teacher is not None
        with self.accelerator.autocast():
            return self.heal_loss.teacher(**inputs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The cross-entropy of a batch of windows for validation; the accuracy of each window is noted."""
        given = self._prepare_inputs(inputs)
        labels = given["labels"]
        first = max(1, int((labels[0] < 0).sum()))  # index of the first token that is predicted
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(input_ids=given["input_ids"], use_cache=False).logits
            self._right.append((logits[:, first - 1 : -1].argmax(-1) == labels[:, first:]).float().mean(-1))
            return cross_entropy(logits, labels), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms of the loss to the entry of a step, and the accuracy to that of an evaluation.

        The Trainer's state, which every checkpoint holds, keeps the entries of evaluations only.

        Raises:
            TensorfoldError: The loss is NaN or infinite.
        """
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise TensorfoldError(
                    f"heal: the loss is {logs['loss']} at step {self.state.global_step}; the earlier checkpoints are "
                    f"intact. {self.heal_loss.remedy()}"
                )
            for name, part in self._parts.items():
                logs[name] = self.accelerator.reduce(part, "mean").item()
            self._parts = {}
        if "eval_loss" in logs:
            right = self.accelerator.reduce(torch.cat(self._right).mean(), "mean")
            logs["eval_accuracy"] = right.item()
            self._right = []
        super().log(logs, start_time)
        if "eval_loss" not in logs:
            self.state.log_history.pop()

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; before the first step the result is noted as the best so far."""
        metrics = super()._evaluate(*args, **kwargs)
        if not self.state.global_step:
            self.state.best_metric, self.state.best_global_step = metrics["eval_loss"], 0
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        loss = metrics["eval_loss"]
        better = self.state.best_metric is None or loss < self.state.best_metric
        if better:
            self.state.best_metric, self.state.best_global_step = loss, self.state.global_step
            self.control.should_save = True
        elif self._out_of_patience():
            self.control.should_save = self.control.should_training_stop = True
        return better

    def _out_of_patience(self) -> bool:
        if self.settings.patience is None or self.state.best_global_step is None:
            return False
        since = [each for each in self.state.log_history if each["step"] > self.state.best_global_step]
        return len(since) >= self.settings.patience

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing or self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        work = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        with self._writing_together(work / name) as partial:
            self._writing = partial
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._writing = None
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                self.state.best_model_checkpoint = None  # it names the partial directory
                self.state.save_to_json(str(partial / name / STATE))
                for path in (partial / name).iterdir():
                    path.rename(partial / path.name)
                (partial / name).rmdir()
        if self.is_world_process_zero():
            rotate(work, self.state.global_step)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _writing_together(self, target: Path) -> Iterator[Path]:
        """Yield one temporary directory to all processes, which the main one turns into ``target`` at the end."""
        with ExitStack() as stack:
            path = [str(stack.enter_context(sealed(target))) if self.is_world_process_zero() else ""]
            if self.args.world_size > 1:
                broadcast_object_list(path)
            yield Path(path[0])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model's weights; under FSDP the Trainer writes shards itself."""
        if self.is_fsdp_enabled or not self.is_world_process_zero():
            return
        assert output_dir is not None
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file(own_tensors(self.model), Path(output_dir) / "model.safetensors", metadata={"format": "pt"})

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        missing = set(load_result.missing_keys) - set(self.model.state_dict().keys() - own_tensors(self.model).keys())
        if missing or load_result.unexpected_keys:
            raise TensorfoldError(
                f"heal: the checkpoint lacks {sorted(missing)}, and holds {load_result.unexpected_keys} that the model "
                "does not have; remove the working directory to begin anew."
            )

    def load_step(self, path: Path) -> None:
        """Load the weights of a checkpoint."""
        self.state.best_model_checkpoint = str(path)
        self._load_best_model()

    def plain_model(self) -> nn.Module:
        """The model without the wrappers of accelerate."""
        return self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False, keep_torch_compile=False)


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's state by name, tied ones once under their first name."""
    once: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        once.setdefault(id(tensor), name)
    return {name: state[name].detach().contiguous() for name in once.values()}


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The Trainer's state in a checkpoint, as its JSON values."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
