"""Block by block: each folded block is trained to give the dense block's output, fed by the healed blocks before it.

The dense model's activations are carried from block to block beside the healed model's, so no step runs more than one
block, and the gradient never leaves it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tensorfold.calibration.block_stream import BlockStream
from tensorfold.errors import InputError
from tensorfold.models.anatomy import blocks
from tensorfold.models.modes import evaluation_mode
from tensorfold.nn import FoldedModule
from tensorfold.recipes.settings import HealSettings
from tensorfold.utils.activation_store import ActivationStore
from tensorfold.utils.block_checkpoints import BlockCheckpoints
from tensorfold.utils.fingerprints import hash_model, hash_tensor
from tensorfold.utils.terminal import progress_bar

log = logging.getLogger(__name__)

_SETTINGS = (
    "blockwise_epochs",
    "blockwise_batch",
    "blockwise_lr",
    "betas",
    "weight_decay",
    "precision",
    "freeze_scalars",
    "seed",
)

_HELD_OUT = 16
_WARMUP = 10
_FLOOR = 0.01


@dataclass(frozen=True)
class BlockOutcome:
    """One block: :func:`relative_loss` on the held-out windows before and after training.

    ``healed`` is false where training did not lower it and the cores stayed as they were; ``resumed`` is true where
    the result came from a checkpoint. ``seconds`` are those of the training.
    """

    index: int
    before: float
    after: float
    healed: bool
    resumed: bool
    seconds: float


@dataclass(frozen=True)
class BlockwiseReport:
    """What :func:`heal_blocks` did to each block with cores.

    ``tokens``: trained on in every pass. ``held_out_tokens``: judged by. ``parameters``: trained in all blocks.
    """

    blocks: tuple[BlockOutcome, ...]
    tokens: int
    held_out_tokens: int
    parameters: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "blocks": [asdict(block) for block in self.blocks], "seconds": round(self.seconds, 3)}


def heal_blocks(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    windows: Tensor,
    settings: HealSettings,
    *,
    checkpoint: Path | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = False,
) -> BlockwiseReport:
    """Train the cores of ``student``, one transformer block after another, to follow ``teacher``; in place.

    Each block takes the healed student's activations and is trained towards the output of the teacher's block in the
    teacher's own stream, so it also makes up for what the blocks before it left wrong. The loss is
    :func:`relative_loss`; AdamW with ``betas``, ``weight_decay`` and a cosine from ``blockwise_lr`` to 0 over
    ``blockwise_epochs`` passes, which the first ten steps rise to from a tenth of it; ``blockwise_batch`` windows a
    step, in an order that depends on ``seed`` and the block alone. The last sixteenth of the windows, one at least, is
    not trained on: a block whose loss did not fall there keeps the cores it came with.

    Memory beyond the two models: two activations a token (student's and teacher's; past ``activations_mb`` in mapped
    files), and for one block at a time its gradients, its optimiser state and the graph of one step.

    Args:
        student: Folded, in fp32. Only cores, and bond scalars unless ``freeze_scalars``, change.
        teacher: The dense model it was folded from, in the same number of blocks.
        windows: Token indices, shape (windows, length), at least two windows.
        settings: ``blockwise_…``, ``activations_mb``, ``betas``, ``weight_decay``, ``precision``, ``freeze_scalars``
            and ``seed`` are used.
        checkpoint: Directory that receives each finished block. The same call with the models as they were at first
            takes finished blocks from there, and ends with the weights of an uninterrupted run.
        on_step: Given ``block``, ``step``, ``steps`` (of the block), ``loss``, ``lr`` and ``tokens`` of each step.
        progress: Show a progress bar on standard error.

    Raises:
        InputError: Models, windows or checkpoint do not fit together. Found before anything is changed, but for a
            checkpoint of another run.
        TensorfoldError: An activation is not finite, or the disk is full.
    """
    started = time.monotonic()
    trained = _trained(student, teacher, windows, settings)
    held_out = max(1, len(windows) // _HELD_OUT)
    fitted = len(windows) - held_out
    store = None
    if checkpoint:
        store = BlockCheckpoints(checkpoint, _run_key(student, teacher, windows, settings), "healing run")
    outcomes: list[BlockOutcome] = []
    modes = evaluation_mode(student), evaluation_mode(teacher)
    with modes[0], modes[1], torch.no_grad(), _frozen(student), _Bar(progress, len(trained)) as bar:
        pair: _Pair | None = None
        for index, parameters in trained.items():
            saved = store.load(index) if store else None
            if saved is not None:
                tensors, outcome = saved
                with torch.no_grad():
                    for name, parameter in parameters.items():
                        parameter.copy_(tensors[name])
                outcomes.append(BlockOutcome(index=index, resumed=True, **outcome))
                bar.finish_block()
                continue
            if pair is None:
                pair = _Pair(student, teacher, windows, settings)
                idle = [k for k in trained if not pair.student.calls(k)]
                if idle:
                    raise InputError(
                        f"block-by-block healing: text does not go through the folded block {idle[0]}, so it cannot be "
                        "trained on it; leave its matrices dense, or set blockwise_tokens: 0."
                    )
            pair.advance_to(index)
            healed = _heal_block(pair, fitted, list(parameters.values()), settings, (bar, on_step))
            if store:
                store.save(index, parameters, {k: getattr(healed, k) for k in ("before", "after", "healed", "seconds")})
            outcomes.append(healed)
            bar.finish_block()
    length = windows.shape[1]
    count = sum(parameter.numel() for parameters in trained.values() for parameter in parameters.values())
    return BlockwiseReport(tuple(outcomes), fitted * length, held_out * length, count, time.monotonic() - started)


def relative_loss(output: Tensor, target: Tensor, floor: float = 0.0) -> Tensor:
    """``mean over tokens of ‖ŷ − y‖² / max(‖y‖², floor)``, for hidden states of shape (..., width).

    Each token counts by its relative error, as it does for the RMSNorm that reads the stream next, so a token with
    giant activations counts as one token. In SmolLM2-135M the first position has a norm of 25,000 from block 11 on
    where the median is 135, and makes up 60 % of the squared error of a folded model (512 tokens a window). In blocks 2
    to 8 tokens at other positions (5, 8, 18, …) have five to ten times the median norm and five of 1536 make up 34 % of
    the squared error after block 2, so leaving out the first position would not do.
    """
    error = (output.float() - target.float()).square().sum(-1)
    size = target.float().square().sum(-1)
    return (error / size.clamp_min(max(floor, torch.finfo(torch.float32).tiny))).mean()


class _Pair:
    """Student's stream at the entrance of a block, teacher's at its exit."""

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, windows: Tensor, settings: HealSettings
    ) -> None:
        allocate = ActivationStore(settings.activations_mb)
        self.student = BlockStream(student, windows, allocate, settings.blockwise_batch)
        self.teacher = BlockStream(teacher, windows, allocate)
        self._dtype = torch.bfloat16 if settings.precision == "bf16" else None
        self.floor = 0.0

    @property
    def index(self) -> int:
        return self.student.position

    def advance_to(self, index: int) -> None:
        self.student.advance_to(index)
        self.teacher.advance_to(index + 1)
        # Tokens of next to no activation, such as padding rows, would otherwise have next to infinite weight.
        sizes = torch.cat([hidden.float().square().sum(-1).flatten() for hidden in self.teacher.hidden.split(1)])
        self.floor = _FLOOR * sizes.median().item()

    def loss(self, chosen: Tensor) -> Tensor:
        """Loss of the block on the windows with the indices ``chosen``."""
        device = self.student.device
        with torch.autocast(device.type, self._dtype, enabled=self._dtype is not None):
            output = self.student.run(self.index, chosen)
        return relative_loss(output, self.teacher.hidden[chosen].to(device), self.floor)

    def loss_over(self, first: int) -> float:
        """Mean loss over the windows from ``first`` on."""
        indices = torch.arange(first, len(self.student.windows)).split(1)
        return sum(self.loss(chosen).item() for chosen in indices) / len(indices)


def _heal_block(
    pair: _Pair,
    fitted: int,
    parameters: list[nn.Parameter],
    settings: HealSettings,
    watchers: tuple[_Bar, Callable[[dict[str, Any]], None] | None],
) -> BlockOutcome:
    started = time.monotonic()
    before = pair.loss_over(fitted)
    start = [parameter.detach().clone() for parameter in parameters]
    _train(pair, fitted, parameters, settings, watchers)
    after = pair.loss_over(fitted)
    healed = after < before  # also false for NaN
    if not healed:
        log.warning(
            "block %d: its held-out loss went from %.4g to %.4g, so it keeps the cores it came with; a lower "
            "blockwise_lr or more blockwise_tokens may help",
            pair.index,
            before,
            after,
        )
        for parameter, value in zip(parameters, start, strict=True):
            parameter.copy_(value)
    return BlockOutcome(pair.index, before, after if healed else before, healed, False, time.monotonic() - started)


def _train(
    pair: _Pair,
    fitted: int,
    parameters: list[nn.Parameter],
    settings: HealSettings,
    watchers: tuple[_Bar, Callable[[dict[str, Any]], None] | None],
) -> None:
    """Minimise the loss on the first ``fitted`` windows; ends early where it is no longer a number."""
    bar, on_step = watchers
    length = pair.student.windows.shape[1]
    order = torch.Generator().manual_seed(settings.seed * 1_000_003 + pair.index)
    steps = settings.blockwise_epochs * -(-fitted // settings.blockwise_batch)
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.blockwise_lr, betas=settings.betas, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, steps))
    for parameter in parameters:
        parameter.requires_grad_(True)
    step = 0
    try:
        for _ in range(settings.blockwise_epochs):
            for chosen in torch.randperm(fitted, generator=order).split(settings.blockwise_batch):
                with torch.enable_grad():
                    loss = pair.loss(chosen)
                loss.backward()
                value, lr = loss.item(), schedule.get_last_lr()[0]
                if not math.isfinite(value):
                    return
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                step += 1
                bar.step(step / steps, value, len(chosen) * length)
                if on_step is not None:
                    on_step(
                        {
                            "block": pair.index,
                            "step": step,
                            "steps": steps,
                            "loss": value,
                            "lr": lr,
                            "tokens": len(chosen) * length,
                        }
                    )
    finally:
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(False)


def _cosine(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step: a cosine from 1 to 0, times a rise from 0.1 to 1 over the first ten.

    The rise is for Adam, whose averages are few at first.
    """
    return min(1.0, (step + 1) / _WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _trained(
    student: PreTrainedModel, teacher: PreTrainedModel, windows: Tensor, settings: HealSettings
) -> dict[int, dict[str, nn.Parameter]]:
    """The parameters to train, by block and by name in the model.

    Raises:
        InputError: The call cannot work.
    """
    name, ours = blocks(student)
    theirs = blocks(teacher)[1]
    widths = [model.get_input_embeddings().embedding_dim for model in (student, teacher)]
    if len(ours) != len(theirs) or widths[0] != widths[1]:
        raise InputError(
            f"block-by-block healing: the folded model has {len(ours)} blocks of width {widths[0]}, the teacher "
            f"{len(theirs)} of width {widths[1]}; needed the dense model that was folded, or blockwise_tokens: 0."
        )
    if windows.dim() != 2 or len(windows) < 2:
        raise InputError(
            f"block-by-block healing: got windows of shape {tuple(windows.shape)}; needed at least 2 windows, one to "
            "train on and one to judge by. Raise blockwise_tokens."
        )
    trained: dict[int, dict[str, nn.Parameter]] = {}
    for index, block in enumerate(ours):
        for inner, module in block.named_modules():
            if not isinstance(module, FoldedModule):
                continue
            for key, parameter in module.named_parameters():
                if key.startswith("cores.") or (key == "scalars" and not settings.freeze_scalars):
                    trained.setdefault(index, {})[f"{name}.{index}.{inner}.{key}"] = parameter
    if not trained:
        raise InputError("block-by-block healing: no block has folded matrices; fold some first.")
    for key, parameter in ((k, p) for parameters in trained.values() for k, p in parameters.items()):
        if parameter.dtype != torch.float32:
            raise InputError(
                f"block-by-block healing: {key} is {parameter.dtype}; needed torch.float32, in which small steps are "
                "not rounded away. Load the model with dtype=torch.float32."
            )
    return trained


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for gradients, so that each block's training asks for its own alone."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


class _Bar:
    """Progress in blocks, with the loss and tokens a second."""

    def __init__(self, visible: bool, total: int) -> None:
        self._progress = progress_bar("heal, block by block", visible)
        self._task = self._progress.add_task("", total=total)
        self._done = 0
        self._last = time.monotonic()

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def step(self, fraction: float, loss: float, tokens: int) -> None:
        now = time.monotonic()
        description = f"loss {loss:.4f}, {tokens / max(now - self._last, 1e-9):,.0f} tokens/s"
        self._progress.update(self._task, completed=round(self._done + fraction, 2), description=description)
        self._last = now

    def finish_block(self) -> None:
        self._done += 1
        self._progress.update(self._task, completed=self._done)
        self._last = time.monotonic()


def _run_key(student: PreTrainedModel, teacher: PreTrainedModel, windows: Tensor, settings: HealSettings) -> str:
    """Hash of all that decides the result: both models, the tokens, and the settings that are used."""
    decided = json.dumps({name: getattr(settings, name) for name in _SETTINGS})
    parts = [decided, hash_tensor(windows), hash_model(student), hash_model(teacher)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
