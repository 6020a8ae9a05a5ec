"""The set-up of end-to-end healing from its settings: what trains, on which windows, with which arguments."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler, Subset
from transformers import PreTrainedModel, TrainingArguments

from tensorfold.data.windows import TokenWindows
from tensorfold.errors import InputError
from tensorfold.healing.device import uses_cpu
from tensorfold.nn import FoldedModule, FoldedTable
from tensorfold.recipes.settings import HealSettings

_FEWEST_VALIDATED = 64  # windows


def choose_trained(model: PreTrainedModel, settings: HealSettings) -> list[nn.Parameter]:
    """Set ``requires_grad`` of a model's parameters by ``settings.train`` and ``settings.freeze_scalars``.

    ``cores`` are the parameters of folded modules; ``all-but-embeddings`` leaves out the tables of tokens and
    positions, and a head that is tied to one.

    Returns:
        The parameters that are trained.

    Raises:
        InputError: There are none.
    """
    folded = [module for module in model.modules() if isinstance(module, FoldedModule)]
    cores = {id(parameter) for module in folded for parameter in module.parameters()}
    kinds = nn.Embedding | FoldedTable
    tables = [model.get_input_embeddings(), *(each for each in model.modules() if isinstance(each, kinds))]
    embeddings = {id(parameter) for table in tables for parameter in table.parameters()}
    scalars = {id(module.scalars) for module in folded if module.scalars is not None}
    for parameter in model.parameters():
        trains = {
            "all": True,
            "cores": id(parameter) in cores,
            "all-but-embeddings": id(parameter) not in embeddings,
        }[settings.train]
        parameter.requires_grad_(trains and not (settings.freeze_scalars and id(parameter) in scalars))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise InputError(f"heal: train={settings.train!r} leaves nothing to train; the model has no folded module.")
    return trained


def uses_fsdp() -> bool:
    """Whether ``accelerate launch`` was configured to shard the model (FSDP)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


class RunOrder(Sampler[int]):
    """The windows of a whole run in order, as indices: permutations of the text one after another, or random draws.

    The order depends on the seed alone and is one sequence for the run, not one an epoch: resuming is skipping, and any
    number of devices trains on the same windows.

    Args:
        windows: How many windows the training text has.
        length: How many indices the run takes.
        seed: Seed of the generator.
        draws: Draw every index independently, instead of passing over permutations.
    """

    def __init__(self, windows: int, length: int, seed: int, draws: bool = False) -> None:
        self.windows, self.length, self.seed, self.draws = windows, length, seed, draws

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        if self.draws:
            generator = torch.Generator().manual_seed(self.seed)
            for _ in range(self.length):
                yield int(torch.randint(self.windows, (), generator=generator))
            return
        for epoch in range(math.ceil(self.length / self.windows)):
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(self.windows, generator=generator)[: self.length - epoch * self.windows]
            for part in order.split(1 << 16):
                yield from part.tolist()


def micro_batch(settings: HealSettings, processes: int) -> int:
    """Number of windows in one forward pass on one device.

    Raises:
        InputError: The batch is no multiple of ``processes`` times that number.
    """
    size = settings.micro_batch or settings.batch // processes
    if not size or settings.batch % (size * processes):
        raise InputError(
            f"heal: batch={settings.batch} does not split over {processes} processes with micro_batch="
            f"{settings.micro_batch}; needed batch to be a multiple of their product."
        )
    return size


def intervals(settings: HealSettings) -> tuple[int, int]:
    """Steps between evaluations, and steps between checkpoints.

    Where they are not set, there are ten evaluations in a run and a checkpoint at each.
    """
    evaluate = settings.evaluate_every or max(1, settings.steps // 10)
    return evaluate, settings.save_every or evaluate


def validation_subset(windows: TokenWindows, settings: HealSettings) -> Subset[dict[str, Tensor]]:
    """Evenly spaced windows to validate on, about a third as many as are trained on between two evaluations.

    Validating on them costs about a tenth of that training. There are 64 at least, where the text has as many.
    """
    count = min(len(windows), max(_FEWEST_VALIDATED, intervals(settings)[0] * settings.batch // 3))
    return Subset(windows, [index * len(windows) // count for index in range(count)])


def arguments(
    settings: HealSettings, work: Path, processes: int, validates: bool, report_to: str | list[str]
) -> TrainingArguments:
    """The ``TrainingArguments`` for a run.

    Args:
        settings: Settings of the run.
        work: Its working directory.
        processes: How many processes train.
        validates: Whether there are windows to validate on.
        report_to: Reporters of the Trainer.

    Raises:
        InputError: The batch cannot be divided among the processes.
    """
    micro = micro_batch(settings, processes)
    evaluate, save = intervals(settings)
    schedules: dict[str, tuple[str, dict[str, float]]] = {
        "cosine": ("cosine_with_min_lr", {"min_lr": settings.min_lr}),
        "linear": ("linear", {}),
        "constant": ("constant_with_warmup", {}),
    }
    schedule, options = schedules[settings.schedule]
    # The name differs between releases 5.x of transformers, of which the later ones warn about the former name.
    known = {field.name for field in fields(TrainingArguments)}
    prefix = "activation" if "activation_checkpointing" in known else "gradient"
    checkpointing: dict[str, Any] = {
        f"{prefix}_checkpointing": settings.gradient_checkpointing,
        f"{prefix}_checkpointing_kwargs": {"use_reentrant": False},
    }
    return TrainingArguments(
        output_dir=str(work),
        max_steps=settings.steps,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=settings.batch // (micro * processes),
        learning_rate=settings.lr,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=options,
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        max_grad_norm=settings.clip,
        seed=settings.seed,
        bf16=settings.precision == "bf16",
        torch_compile=settings.compile,
        use_cpu=uses_cpu(),
        dataloader_num_workers=settings.workers,
        dataloader_pin_memory=not uses_cpu(),
        remove_unused_columns=False,
        eval_strategy="steps" if validates else "no",
        eval_steps=evaluate,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=save,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=report_to,
        disable_tqdm=True,
        ddp_find_unused_parameters=not (settings.cross_entropy or settings.kl),
        **checkpointing,
    )
