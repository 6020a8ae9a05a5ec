"""End-to-end healing: the loop of transformers' ``Trainer`` with our loss, our order of data and our checkpoints."""

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
from tensorfold.healing.losses import HealLoss, cross_entropy
from tensorfold.healing.setup import RunOrder, uses_fsdp
from tensorfold.nn import FoldedModule
from tensorfold.recipes.settings import HealSettings


class HealTrainer(Trainer):
    """``Trainer`` with the loss of :class:`HealLoss`, the order of :class:`RunOrder` and sealed checkpoints.

    Validation is the cross-entropy of held-out blocks, whatever the training loss; its best step is checkpointed,
    unless that is the state before the first.
    """

    # The loss is a mean over equal micro-batches, which the Trainer divides by their number.
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
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        # accelerate reads FSDP's configuration on accelerators only, and would train with DDP on CPUs in silence.
        if state.distributed_type == DistributedType.MULTI_CPU and uses_fsdp():
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            # The first holds for this object, the second for those that are made from the shared state later.
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def _get_train_sampler(self, train_dataset: Any = None) -> RunOrder:
        settings = self.settings
        sequences = settings.steps * settings.batch
        return RunOrder(len(self.train_dataset), sequences, settings.seed, draws=settings.windows == "random")

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices and cores; biases, norms and scalars are vectors."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with _as_accelerate_takes_it(self.model if self.is_fsdp_enabled else None):
            return super()._prepare_for_training(*args, **kwargs)

    def _init_training_state(self, max_steps: int, per_epoch: int, epochs: int, *rest: Any) -> tuple[int, int]:
        trained = super()._init_training_state(max_steps, per_epoch, epochs, *rest)
        # A run that patience had ended before it was killed has no step left.
        return (epochs, 0) if self._out_of_patience() else trained

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
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
        given = self._prepare_inputs(inputs)
        labels = given["labels"]
        first = max(1, int((labels[0] < 0).sum()))  # to be predicted
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(input_ids=given["input_ids"], use_cache=False).logits
            self._right.append((logits[:, first - 1 : -1].argmax(-1) == labels[:, first:]).float().mean(-1))
            return cross_entropy(logits, labels), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss's terms to a step's entry and the accuracy to an evaluation's.

        The state, which every checkpoint carries, keeps evaluations only.

        Raises:
            TensorfoldError: The loss is not a number.
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
        """Before the first step too: what came in is the first that can be best."""
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
        """One partial directory for all processes, which the main one seals."""
        with ExitStack() as stack:
            path = [str(stack.enter_context(sealed(target))) if self.is_world_process_zero() else ""]
            if self.args.world_size > 1:
                broadcast_object_list(path)
            yield Path(path[0])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The weights as the model holds them; FSDP writes its own shards beside the optimizer's."""
        if self.is_fsdp_enabled or not self.is_world_process_zero():
            return
        assert output_dir is not None
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file(own_tensors(self.model), Path(output_dir) / "model.safetensors", metadata={"format": "pt"})

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        missing = set(load_result.missing_keys) - set(self.model.state_dict().keys() - own_tensors(self.model).keys())
        if missing or load_result.unexpected_keys:
            raise TensorfoldError(
                f"heal: the checkpoint lacks {sorted(missing)} and has the unexpected {load_result.unexpected_keys}."
            )

    def load_step(self, path: Path) -> None:
        """Load the weights of a checkpoint."""
        self.state.best_model_checkpoint = str(path)
        self._load_best_model()

    def plain_model(self) -> nn.Module:
        """The model without what accelerate put around it."""
        return self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False, keep_torch_compile=False)


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model with every tied tensor once, under its first name."""
    once: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        once.setdefault(id(tensor), name)
    return {name: state[name].detach().contiguous() for name in once.values()}


@contextmanager
def _as_accelerate_takes_it(model: PreTrainedModel | None) -> Iterator[None]:
    """Let accelerate shard whole blocks, and see that a folded embedding and its head share their cores.

    It wraps what a device map may not part, which folded modules are too, and compares ``weight`` to find ties. It
    would shard the two ends apart otherwise, which FSDP2 refuses.
    """
    if model is None:
        yield
        return
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    tied = all(isinstance(end, FoldedModule) for end in ends) and ends[0].cores[0] is ends[1].cores[0]
    whole = model._no_split_modules
    folded = {type(module).__name__ for module in model.modules() if isinstance(module, FoldedModule)}
    try:
        model._no_split_modules = set(whole or ()) - folded
        if tied:
            for end in ends:
                end.__dict__["weight"] = ends[0].cores[0]
        yield
    finally:
        model._no_split_modules = whole
        if tied:
            for end in ends:
                end.__dict__.pop("weight", None)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The Trainer's state in a checkpoint."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
