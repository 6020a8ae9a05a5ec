"""Applying a matrix product operator to vectors, building its matrix, and reading its rows.

:mod:`tensorfold.algebra.ways` chooses the way; here it is carried out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorfold.algebra.cost import Machine, blocking, merging
from tensorfold.algebra.precision import as_given, product_dtype, wide
from tensorfold.algebra.spec import Spec
from tensorfold.algebra.ways import Order, Step, Way, cheapest_order, choose

__all__ = ["Order", "Way", "apply", "cheapest_order", "rows", "to_dense"]


def apply(x: Tensor, cores: Sequence[Tensor], spec: Spec, bias: Tensor | None = None, way: Way | None = None) -> Tensor:
    """``x @ W.T + bias`` for the matrix W that ``cores`` stand for.

    Args:
        x: Shape (..., in_features).
        cores: One tensor a site, shapes ``spec.core_shapes``.
        bias: Shape (out_features,) or None.
        way: What :func:`tensorfold.algebra.ways.choose` gave for ``spec``; the chain of fewest multiply–adds if None.

    Returns:
        Shape (..., out_features), in the dtype that a dense layer would give.
    """
    if way is None:
        way = choose(spec, 1, force="chain")
    if product_dtype(x) is torch.float16:
        with as_given(x.device.type):
            return _in_float16(x, [core.float() for core in cores], spec, bias, way)
    lead = x.shape[:-1]
    tokens = math.prod(lead)
    last = way.steps[-1]
    if len(way.steps) == 1:
        return F.linear(x, _matrix(merge(cores, last.tree), spec), bias)
    outputs = math.prod(spec.out_modes)
    padding = math.prod(spec.in_modes) - spec.in_features
    # A product that makes all outputs of a token at once takes the bias along.
    fused = bias is not None and outputs == spec.out_features == last.d and last.form == "rows" and way.order is None
    state = F.pad(x, (0, padding)) if padding else x
    for step in way.steps[:-1]:
        state = _product(state, cores, step, tokens)
    state = _product(state, cores, last, tokens, bias if fused else None)
    if way.order is not None:
        state = state.reshape(tokens, *way.outputs).permute(0, *(1 + k for k in way.order))
    y = state.reshape(*lead, outputs)
    if outputs != spec.out_features:
        y = y[..., : spec.out_features]
    return y if bias is None or fused else add_bias(y, bias)


def _in_float16(x: Tensor, cores: Sequence[Tensor], spec: Spec, bias: Tensor | None, way: Way) -> Tensor:
    """``apply`` for a result in float16, from cores in float32. Only a product with the whole matrix is safe in it."""
    if way.materialises:
        matrix = _matrix(merge(cores, way.steps[0].tree), spec).half()
        return F.linear(x.half(), matrix, None if bias is None else bias.half())
    return apply(x.float(), cores, spec, None if bias is None else bias.float(), way).half()


def add_bias(y: Tensor, bias: Tensor) -> Tensor:
    """``y + bias`` in the dtype of ``y``; in place, where no gradient is asked for.

    ``y`` must belong to the caller alone. In a backward graph, writing into a view would cost a copy of its own.
    """
    bias = bias if bias.dtype == y.dtype else bias.to(y.dtype)
    return y + bias if torch.is_grad_enabled() else y.add_(bias)


def _product(state: Tensor, cores: Sequence[Tensor], step: Step, tokens: int, bias: Tensor | None = None) -> Tensor:
    """One step; the axes of the result in memory are as :class:`Step` says, its shape is any that views them."""
    core = merge(cores, step.tree)
    if step.core is not None:
        core = core.permute(step.core)
    core = core.reshape(step.c, step.d).T if step.turned else core.reshape(step.d, step.c)
    if step.more_d or step.more_c:
        core = F.pad(core, (0, step.more_c, 0, step.more_d))
    if step.form == "rows":
        if step.order is not None:
            state = state.reshape(tokens, *step.state).permute(0, *(1 + k for k in step.order)).contiguous()
        if step.block > 1:
            eye = torch.eye(step.block, dtype=core.dtype, device=core.device)
            core = (eye[:, None, :, None] * core[:, None]).reshape(step.block * step.d, step.block * step.c)
        rows = tokens * step.left // step.block
        return F.linear(state.reshape(rows, step.block * (step.c + step.more_c)), core, bias)
    # Not matmul, which copies the state where the core is a parameter, even when no gradient is asked for.
    if step.form == "front":
        state = state.reshape(tokens, step.left, step.c).mT
        return torch.bmm(core.expand(tokens, step.d, step.c), state)
    batch = tokens * step.left
    state = state.reshape(batch, step.c, step.right)
    if step.form == "outer":
        return state * core.to(state.dtype)
    if step.form == "left":
        return torch.bmm(core.expand(batch, step.d, step.c), state)
    return torch.bmm(state.mT, core.T.expand(batch, step.c, step.d))


def merge(cores: Sequence[Tensor], tree: Any) -> Tensor:
    """The sites of a tree of pairs as one core, shape (left bond, outputs, inputs, right bond)."""
    if isinstance(tree, int):
        return cores[tree]
    left, right = merge(cores, tree[0]), merge(cores, tree[1])
    r, m1, n1, bond = left.shape
    _, m2, n2, t = right.shape
    if bond == 1:
        product = left.reshape(r, m1, 1, n1, 1, 1) * right.reshape(1, 1, m2, 1, n2, t)
    else:
        k = blocking(tuple(left.shape), tuple(right.shape))
        if k > 1:  # right ⊗ I_k, (k·bond, m2·k·n2·t)
            eye = torch.eye(k, dtype=right.dtype, device=right.device).reshape(k, 1, 1, k, 1, 1)
            right = eye * right.reshape(1, bond, m2, 1, n2, t)
        product = left.reshape(r * m1 * n1 // k, k * bond) @ right.reshape(k * bond, m2 * k * n2 * t)
        product = product.reshape(r, m1, n1 // k, m2, k * n2, t).transpose(2, 3)
    return product.reshape(r, m1 * m2, n1 * n2, t)


def _matrix(core: Tensor, spec: Spec) -> Tensor:
    return core.squeeze(-1).squeeze(0)[: spec.out_features, : spec.in_features]


def to_dense(cores: Sequence[Tensor], spec: Spec) -> Tensor:
    """The matrix itself, shape (out_features, in_features), padding cut off."""
    return _matrix(merge(cores, merging(spec, 0, spec.sites, Machine()).tree), spec)


def rows(index: Tensor, cores: Sequence[Tensor], spec: Spec) -> Tensor:
    """Rows of the matrix, reading only the core slices they need.

    Args:
        index: Integers of any shape (...), each in ``[0, out_features)``.

    Returns:
        Shape (..., in_features), in the dtype of the cores; float32 of those in float16.
    """
    flat, dtype = index.reshape(-1), wide(cores[0].dtype)
    state: Tensor | None = None  # (tokens, J, r)
    stride = math.prod(spec.out_modes)
    for core, m in zip(cores, spec.out_modes, strict=True):
        r, _, n, s = core.shape
        stride //= m
        if m == 1:
            matrix = core.reshape(r, n * s).to(dtype)
            step = matrix if state is None else state @ matrix  # (tokens, J, n·s)
        else:
            slices = core.movedim(1, 0)[flat // stride % m].reshape(-1, r, n * s).to(dtype)
            step = slices if state is None else state @ slices
        state = step.reshape(step.shape[0] if step.dim() == 3 else 1, -1, s)
    assert state is not None
    out = state.squeeze(-1).expand(flat.numel(), -1)[:, : spec.in_features]
    return out.reshape(*index.shape, spec.in_features)
