"""Matrix products of a contraction path's steps: how each form is carried out, and what it costs.

Notation as in :mod:`tensorfold.algebra.contraction.paths`: state (t, l, c, r), core (d, c).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorfold.algebra.contraction.costs import Machine
from tensorfold.algebra.contraction.paths import Form, Step


def multiply(state: Tensor, core: Tensor, step: Step, tokens: int, bias: Tensor | None = None) -> Tensor:
    """State after one step, in any shape that views the axes of the form's equation.

    Args:
        state: Axes (t, l, c, r) of the equation, in any shape that views them.
        core: Shape (d, c).
        step: Form of the product and sizes of its axes.
        tokens: Size of t.
        bias: Shape (d,) or None; only a product of ``Form.ROWS`` that makes all outputs at once can take one along.
    """
    if step.form == Form.ROWS:
        return _rows(state, core, step, tokens, bias)
    if step.form == Form.LEFT:
        return _left(state, core, step, tokens)
    if step.form == Form.RIGHT:
        return _right(state, core, step, tokens)
    if step.form == Form.FRONT:
        return _front(state, core, step, tokens)
    return _outer(state, core, step, tokens)


def seconds(machine: Machine, step: Step, tokens: int) -> float:
    """Estimated seconds of the product of one step, for this many tokens."""
    return _SECONDS[step.form](machine, step, tokens)


def _rows(state: Tensor, core: Tensor, step: Step, tokens: int, bias: Tensor | None) -> Tensor:
    if step.permutation is not None:
        state = state.reshape(tokens, *step.state).permute(0, *(1 + k for k in step.permutation)).contiguous()
    if step.block > 1:  # I_block ⊗ core, (block·d, block·c)
        eye = torch.eye(step.block, dtype=core.dtype, device=core.device)
        core = (eye[:, None, :, None] * core[:, None]).reshape(step.block * step.d, step.block * step.c)
    rows = tokens * step.left // step.block
    return F.linear(state.reshape(rows, step.block * (step.c + step.more_c)), core, bias)  # (t·l/block, block·d)


def _rows_seconds(machine: Machine, step: Step, tokens: int) -> float:
    seconds = machine.product(tokens * step.left / step.block, step.d * step.block, step.c * step.block)
    return seconds + (machine.call if step.block > 1 else 0.0)


# Batched products below use bmm: matmul copies the state where the core is a parameter, even when no gradient is asked
# for. Sizes are read from shapes: len() would fix a traced graph to the number of tokens at hand.


def _left(state: Tensor, core: Tensor, step: Step, tokens: int) -> Tensor:
    state = state.reshape(tokens * step.left, step.c, step.right)
    return torch.bmm(core.expand(state.shape[0], step.d, step.c), state)  # (t·l, d, r)


def _left_seconds(machine: Machine, step: Step, tokens: int) -> float:
    return machine.product(step.d, step.right, step.c, tokens * step.left)


def _right(state: Tensor, core: Tensor, step: Step, tokens: int) -> Tensor:
    state = state.reshape(tokens * step.left, step.c, step.right)
    return torch.bmm(state.mT, core.T.expand(state.shape[0], step.c, step.d))  # (t·l, r, d)


def _right_seconds(machine: Machine, step: Step, tokens: int) -> float:
    return machine.product(step.right, step.d, step.c, tokens * step.left)


def _front(state: Tensor, core: Tensor, step: Step, tokens: int) -> Tensor:
    state = state.reshape(tokens, step.left, step.c).mT
    return torch.bmm(core.expand(tokens, step.d, step.c), state)  # (t, d, l)


def _front_seconds(machine: Machine, step: Step, tokens: int) -> float:
    return machine.product(step.left, step.d, step.c, tokens)


def _outer(state: Tensor, core: Tensor, step: Step, tokens: int) -> Tensor:
    return state.reshape(tokens * step.left, 1, step.right) * core.to(state.dtype)  # (t·l, d, r)


def _outer_seconds(machine: Machine, step: Step, tokens: int) -> float:
    made = tokens * step.left * step.right * step.d
    return machine.spread(made, step.right if step.right > 1 else step.d)


_SECONDS: dict[str, Callable[[Machine, Step, int], float]] = {
    Form.ROWS: _rows_seconds,
    Form.LEFT: _left_seconds,
    Form.RIGHT: _right_seconds,
    Form.FRONT: _front_seconds,
    Form.OUTER: _outer_seconds,
}
