"""Block-by-block healing: each folded block learns the dense block's output from the healed model's own activations.

The hidden states of both models are carried from block to block, so a training step runs a single block, and gradients
never leave it.
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

from tensorfold.algebra.precision import autocast
from tensorfold.calibration.block_loss import least_size, relative_loss
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

_HELD_OUT = 16  # one window in so many is not trained on
_WARMUP = 10  # steps


@dataclass(frozen=True)
class BlockOutcome:
    """The result of healing one block.

    Attributes:
        index: The block's index.
        before: The loss on the held-out windows before training, see
            :func:`tensorfold.calibration.block_loss.relative_loss`.
        after: That loss after training; equal to ``before`` where the block was left as it came.
        healed: Whether training lowered the loss; otherwise the cores are as they came.
        resumed: Whether the block was read from a checkpoint.
        seconds: Wall time of training and of measuring the losses.
    """

    index: int
    before: float
    after: float
    healed: bool
    resumed: bool
    seconds: float


@dataclass(frozen=True)
class BlockwiseReport:
    """The results of healing all blocks that have cores.

    Attributes:
        blocks: One entry a block, in order.
        tokens: Tokens trained on in each pass.
        held_out_tokens: Tokens of the windows that blocks are judged by.
        parameters: Parameters trained, in all blocks together.
        seconds: Wall time of the whole.
    """

    blocks: tuple[BlockOutcome, ...]
    tokens: int
    held_out_tokens: int
    parameters: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the field names, ready for JSON."""
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
    """Train the cores of a folded model, one transformer block after another, in place.

    Each block is given the hidden states of the healed student and is trained towards those behind the teacher's block,
    so it also makes up for the errors of the blocks before it. The loss is
    :func:`tensorfold.calibration.block_loss.relative_loss`. The optimiser is AdamW with ``betas`` and ``weight_decay``;
    its learning rate rises to ``blockwise_lr`` over ten steps and falls to 0 by a cosine over ``blockwise_epochs``
    passes.
    A step takes ``blockwise_batch`` windows, in an order that depends on ``seed`` and the block alone. The last
    sixteenth of the windows, at least one, is not trained on: a block whose loss did not fall there keeps the cores it
    came with.

    Memory beside the two models: the hidden states of both for all tokens (beyond ``activations_mb`` in mapped files),
    and for one block at a time its gradients, its optimiser state and the graph of one step.

    Args:
        student: The folded model, in fp32. Only its cores change, and its bond scalars unless ``freeze_scalars``.
        teacher: The dense model that it was folded from, with the same number of blocks.
        windows: Token ids, shape (windows, length), at least two windows.
        settings: Used are ``blockwise_…``, ``activations_mb``, ``betas``, ``weight_decay``, ``precision``,
            ``freeze_scalars`` and ``seed``.
        checkpoint: Directory that receives each finished block. The same call with the models as they were at first
            reads finished blocks from there, and ends with the weights of an uninterrupted run.
        on_step: Called after each step with ``block``, ``step``, ``steps`` (of the block), ``loss``, ``lr`` and
            ``tokens`` (of the step).
        progress: Show a progress bar on standard error.

    Raises:
        InputError: Models, windows or checkpoint do not fit together. Nothing has been changed then, unless the
            checkpoint turns out to be of another run.
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


class _Pair:
    """The hidden states of the student at a block's entrance, and those of the teacher at its exit.

    Attributes:
        student: The student's stream.
        teacher: The teacher's stream.
        floor: Least squared norm in the loss, see :func:`tensorfold.calibration.block_loss.relative_loss`.
    """

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
        """Index of the block."""
        return self.student.position

    def advance_to(self, index: int) -> None:
        """Carry both streams on to block ``index``."""
        self.student.advance_to(index)
        self.teacher.advance_to(index + 1)
        self.floor = least_size(self.teacher.hidden)

    def loss(self, chosen: Tensor) -> Tensor:
        """The block's loss on the windows with the indices ``chosen``."""
        device = self.student.device
        with autocast(device.type, self._dtype):
            output = self.student.run(self.index, chosen)
        return relative_loss(output, self.teacher.hidden[chosen].to(device), self.floor)

    def loss_over(self, first: int) -> float:
        """The block's mean loss over the windows from index ``first`` on."""
        indices = torch.arange(first, len(self.student.windows)).split(1)
        return sum(self.loss(chosen).item() for chosen in indices) / len(indices)


def _heal_block(
    pair: _Pair,
    fitted: int,
    parameters: list[nn.Parameter],
    settings: HealSettings,
    watchers: tuple[_Bar, Callable[[dict[str, Any]], None] | None],
) -> BlockOutcome:
    """Train one block on the first ``fitted`` windows; give it its old cores back unless the held-out loss fell."""
    started = time.monotonic()
    before = pair.loss_over(fitted)
    start = [parameter.detach().clone() for parameter in parameters]
    _train(pair, fitted, parameters, settings, watchers)
    after = pair.loss_over(fitted)
    healed = after < before  # also false for NaN
    if not healed:
        log.warning(
            "block %d: training changed its held-out loss from %.4g to %.4g, so it keeps the cores it came with; a "
            "lower blockwise_lr or more blockwise_tokens may help",
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
    """Minimise the loss on the first ``fitted`` windows, and stop early where it is NaN or infinite."""
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
    """The learning rate at a step as a share of its peak: a cosine from 1 to 0, times a linear rise from 0.1 to 1.

    The rise takes the first ten steps, in which Adam's averages have too few terms to be trusted.
    """
    return min(1.0, (step + 1) / _WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _trained(
    student: PreTrainedModel, teacher: PreTrainedModel, windows: Tensor, settings: HealSettings
) -> dict[int, dict[str, nn.Parameter]]:
    """The parameters to train, by the index of their block and by their name in the model.

    Raises:
        InputError: The models do not fit each other, the windows are too few, or nothing can be trained.
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
    """Keep all parameters from requiring gradients while the context is open; training a block sets its own."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


class _Bar:
    """A progress bar that counts blocks, and shows the loss and tokens a second."""

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
        """Show a step of ``tokens`` tokens, after which the given fraction of the block is done."""
        now = time.monotonic()
        description = f"loss {loss:.4f}, {tokens / max(now - self._last, 1e-9):,.0f} tokens/s"
        self._progress.update(self._task, completed=round(self._done + fraction, 2), description=description)
        self._last = now

    def finish_block(self) -> None:
        """Show that a block is done."""
        self._done += 1
        self._progress.update(self._task, completed=self._done)
        self._last = time.monotonic()


def _run_key(student: PreTrainedModel, teacher: PreTrainedModel, windows: Tensor, settings: HealSettings) -> str:
    """SHA-256 of everything that decides the result: both models, the tokens, and the settings that are used."""
    decided = json.dumps({name: getattr(settings, name) for name in _SETTINGS})
    parts = [decided, hash_tensor(windows), hash_model(student), hash_model(teacher)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
