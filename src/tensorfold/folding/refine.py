"""Refining a folded block: a few steps towards the dense model's output, from the closed form on.

Each matrix of a block is fitted in closed form to what it should answer; together they still miss the block's output by
more than they need to. A few steps of Adam on all of the block's cores, norms and biases at once take away part of it
(AA-SVD's refinement). The block is given the folded model's states, so that it also makes up for the blocks before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tensorfold.calibration.block_loss import least_size, relative_loss
from tensorfold.calibration.block_stream import BlockStream
from tensorfold.calibration.error_feedback import Reference
from tensorfold.nn import FoldedModule

_HELD_OUT = 16  # one window in so many is not stepped on, at least one
_RATE = 2e-3  # of a parameter's root mean square, the size of the first steps
_BETAS = (0.9, 0.98)
_EXACT = (torch.float32, torch.float64)  # in less, small steps are rounded away


@dataclass(frozen=True)
class Refinement:
    """What the steps did to one block.

    Attributes:
        block: The block's name in the model.
        parameters: What was stepped, by name in the model, also where the steps were taken back: on unequal machines
            the last digit may decide that, and ranks have to send each other the same tensors.
        before, after: The relative error of the block's output on windows that no step was taken on, see
            :func:`~.block_loss.relative_loss`; equal where the block was left as it came.
    """

    block: str
    parameters: dict[str, nn.Parameter]
    before: float
    after: float


def refine_block(stream: BlockStream, index: int, reference: Reference, steps: int) -> Refinement:
    """Step the parameters of a folded block towards the dense model's output, in place; never to a worse one.

    Args:
        stream: The folded model's states, at the entrance of block ``index``, which has been folded.
        reference: The dense model, whose states are carried behind that block.
        steps: How many steps are taken, of one window each.
    """
    reference.advance_to(index + 1)
    name = f"{stream.name}.{index}"
    parameters = _parameters(name, stream.blocks[index])
    wanted = reference.stream.hidden
    floor = least_size(wanted)
    held_out = max(1, len(wanted) // _HELD_OUT)
    fitted = len(wanted) - held_out

    def loss(k: int) -> Tensor:
        return relative_loss(stream.run(index, slice(k, k + 1)), wanted[k : k + 1].to(stream.device), floor)

    def judged() -> float:
        return sum(loss(k).item() for k in range(fitted, len(wanted))) / held_out

    before, start = judged(), [parameter.detach().clone() for parameter in parameters.values()]
    if fitted < 1 or any(parameter.dtype not in _EXACT for parameter in parameters.values()):
        return Refinement(name, {}, before, before)
    order = torch.Generator().manual_seed(index)
    windows = torch.cat([torch.randperm(fitted, generator=order) for _ in range(-(-steps // fitted))])[:steps]
    with _alone(stream.model, parameters.values()):
        _step(list(parameters.values()), windows.tolist(), loss)
    after = judged()
    if after < before:  # also false for NaN
        return Refinement(name, parameters, before, after)
    for parameter, value in zip(parameters.values(), start, strict=True):
        parameter.copy_(value)
    return Refinement(name, parameters, before, before)


def _step(parameters: list[nn.Parameter], windows: list[int], loss: Callable[[int], Tensor]) -> None:
    """One step of Adam for each window."""
    rates = [_RATE * max(1e-8, float(parameter.detach().square().mean()) ** 0.5) for parameter in parameters]
    groups = [{"params": [parameter], "lr": rate} for parameter, rate in zip(parameters, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=_BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, len(windows)))
    for k in windows:
        with torch.enable_grad():
            value = loss(k)
        if not torch.isfinite(value):
            return
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@contextmanager
def _alone(model: nn.Module, parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Within it these parameters of the model ask for gradients and no others; afterwards as before."""
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    own = {id(parameter) for parameter in parameters}
    try:
        for parameter in wanted:
            parameter.requires_grad_(id(parameter) in own)
        yield
    finally:
        for parameter, want in wanted.items():
            parameter.grad = None
            parameter.requires_grad_(want)


def _parameters(name: str, block: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the folded modules of a block, and all its vectors (norms and biases), by name in the model."""
    folded = {id(p) for module in block.modules() if isinstance(module, FoldedModule) for p in module.parameters()}
    return {
        f"{name}.{key}": parameter
        for key, parameter in block.named_parameters()
        if parameter.is_floating_point() and (id(parameter) in folded or parameter.dim() == 1)
    }


def _cosine(step: int, steps: int) -> float:
    """A rise over the first tenth of the steps, then a fall to nearly 0."""
    warm = max(1, steps // 10)
    return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / max(1, steps))))
