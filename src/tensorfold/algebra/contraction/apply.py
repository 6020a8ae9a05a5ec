"""Applying a matrix product operator to vectors, building its matrix, and reading its rows.

Notation:
    W           matrix that the cores stand for, (out_features, in_features)
    core        (r, m, n, s): left bond, out mode, in mode, right bond
    state       a tensor of every token's open axes: input modes not read yet, output modes made, open bonds

:mod:`tensorfold.algebra.contraction.search` finds the path; here it is carried out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorfold.algebra.contraction.costs import Machine, blocking, merging
from tensorfold.algebra.contraction.forms import multiply
from tensorfold.algebra.contraction.paths import Chain, ContractionPath, Form, Step
from tensorfold.algebra.contraction.search import fastest_path
from tensorfold.algebra.precision import as_given, product_dtype, wide


def apply(
    x: Tensor, cores: Sequence[Tensor], spec: Chain, bias: Tensor | None = None, path: ContractionPath | None = None
) -> Tensor:
    """Product ``x Wᵀ + bias`` with the matrix W of a chain of cores.

    Args:
        x: Shape (..., in_features).
        cores: One tensor a site, shapes ``spec.core_shapes``.
        spec: Shape of the chain.
        bias: Shape (out_features,) or None.
        path: Contraction path for ``spec`` from :func:`.search.fastest_path`; the order of sites with the fewest
            multiply–adds if None.

    Returns:
        Shape (..., out_features), in the dtype that a dense layer would give.
    """
    if path is None:
        path = fastest_path(spec, 1, force="chain")
    if product_dtype(x) is torch.float16:
        with as_given(x.device.type):
            return _in_float16(x, [core.float() for core in cores], spec, bias, path)
    lead = x.shape[:-1]
    tokens = math.prod(lead)
    last = path.steps[-1]
    if len(path.steps) == 1:
        return F.linear(x, _matrix(merge(cores, last.tree), spec), bias)
    outputs = math.prod(spec.out_modes)
    padding = math.prod(spec.in_modes) - spec.in_features
    # A product that makes all outputs of a token at once takes the bias along.
    whole = last.form == Form.ROWS and last.d == outputs == spec.out_features and path.permutation is None
    fused = bias is not None and whole
    state = F.pad(x, (0, padding)) if padding else x
    for step in path.steps[:-1]:
        state = _product(state, cores, step, tokens)
    state = _product(state, cores, last, tokens, bias if fused else None)
    if path.permutation is not None:
        state = state.reshape(tokens, *path.outputs).permute(0, *(1 + k for k in path.permutation))
    y = state.reshape(*lead, outputs)
    if outputs != spec.out_features:
        y = y[..., : spec.out_features]
    return y if bias is None or fused else add_bias(y, bias)


def _in_float16(x: Tensor, cores: Sequence[Tensor], spec: Chain, bias: Tensor | None, path: ContractionPath) -> Tensor:
    """``x Wᵀ + bias`` in float16 from cores in float32: only a product with the whole matrix is safe in float16."""
    if len(path.steps) == 1:
        matrix = _matrix(merge(cores, path.steps[0].tree), spec).half()
        return F.linear(x.half(), matrix, None if bias is None else bias.half())
    return apply(x.float(), cores, spec, None if bias is None else bias.float(), path).half()


def add_bias(y: Tensor, bias: Tensor) -> Tensor:
    """Add a bias (out,) to y (..., out), in the dtype of ``y``; in place, where no gradient is asked for.

    ``y`` must belong to the caller alone. In a backward graph, writing into a view would cost a copy of its own.
    """
    bias = bias if bias.dtype == y.dtype else bias.to(y.dtype)
    return y + bias if torch.is_grad_enabled() else y.add_(bias)


def _product(state: Tensor, cores: Sequence[Tensor], step: Step, tokens: int, bias: Tensor | None = None) -> Tensor:
    """State after one step of a path: the axes of its form's equation in memory, in any shape that views them."""
    return multiply(state, _factor(cores, step), step, tokens, bias)


def _factor(cores: Sequence[Tensor], step: Step) -> Tensor:
    """Core of a step as a matrix (d, c)."""
    core = merge(cores, step.tree)
    if step.core_axes is not None:
        core = core.permute(step.core_axes)
    core = core.reshape(step.c, step.d).T if step.transposed else core.reshape(step.d, step.c)
    return F.pad(core, (0, step.more_c, 0, step.more_d)) if step.more_d or step.more_c else core


def stored_factors(cores: Sequence[Tensor], path: ContractionPath) -> list[Tensor] | None:
    """Cores of all steps as matrices (d, c) that are views of the stored ones; None where a step has to copy them."""
    if not all(isinstance(step.tree, int) and not (step.more_d or step.more_c) for step in path.steps):
        return None
    factors = [_factor(cores, step) for step in path.steps]
    addresses = {core.untyped_storage().data_ptr() for core in cores}
    return factors if all(each.untyped_storage().data_ptr() in addresses for each in factors) else None


def merge(cores: Sequence[Tensor], tree: Any) -> Tensor:
    """Cores of neighbouring sites multiplied together, as one core (left bond, out modes, in modes, right bond).

    Args:
        cores: Shapes (r, m, n, s).
        tree: A site's number, or a pair of trees: which neighbours are multiplied together first.
    """
    if isinstance(tree, int):
        return cores[tree]
    left, right = merge(cores, tree[0]), merge(cores, tree[1])
    r, m1, n1, bond = left.shape
    _, m2, n2, t = right.shape
    if bond == 1:
        product = left.reshape(r, m1, 1, n1, 1, 1) * right.reshape(1, 1, m2, 1, n2, t)  # (r, m1, m2, n1, n2, t)
    else:
        k = blocking(tuple(left.shape), tuple(right.shape))
        if k > 1:  # right ⊗ I_k, (k·bond, m2·k·n2·t)
            eye = torch.eye(k, dtype=right.dtype, device=right.device).reshape(k, 1, 1, k, 1, 1)
            right = eye * right.reshape(1, bond, m2, 1, n2, t)
        product = left.reshape(r * m1 * n1 // k, k * bond) @ right.reshape(k * bond, m2 * k * n2 * t)
        product = product.reshape(r, m1, n1 // k, m2, k * n2, t).transpose(2, 3)  # (r, m1, m2, n1 / k, k·n2, t)
    return product.reshape(r, m1 * m2, n1 * n2, t)


def _matrix(core: Tensor, spec: Chain) -> Tensor:
    """Matrix (out_features, in_features) of a core (1, rows, columns, 1) that holds all sites, padding cut off."""
    return core.squeeze(-1).squeeze(0)[: spec.out_features, : spec.in_features]


def to_dense(cores: Sequence[Tensor], spec: Chain) -> Tensor:
    """Matrix W of a chain of cores, shape (out_features, in_features), padding cut off."""
    return _matrix(merge(cores, merging(spec, 0, spec.sites, Machine()).tree), spec)


def rows(index: Tensor, cores: Sequence[Tensor], spec: Chain) -> Tensor:
    """Rows of W, from only the core slices that they need.

    Args:
        index: Integers of any shape (...), each in ``[0, out_features)``.
        cores: One tensor a site, shapes ``spec.core_shapes``.
        spec: Shape of the chain.

    Returns:
        Shape (..., in_features), in the dtype of the cores; float32 of those in float16.
    """
    flat, dtype = index.reshape(-1), wide(cores[0].dtype)
    state: Tensor | None = None  # (tokens, J, r)
    stride, columns = math.prod(spec.out_modes), 1
    for core, m in zip(cores, spec.out_modes, strict=True):
        r, _, n, s = core.shape
        stride, columns = stride // m, columns * n
        if m == 1:
            matrix = core.reshape(r, n * s).to(dtype)
            step = matrix if state is None else state @ matrix  # (tokens, J, n·s)
        else:
            slices = core.movedim(1, 0)[flat // stride % m].reshape(flat.numel(), r, n * s).to(dtype)
            step = slices if state is None else state @ slices
        state = step.reshape(step.shape[0] if step.dim() == 3 else 1, columns, s)
    assert state is not None
    out = state.squeeze(-1).expand(flat.numel(), columns)[:, : spec.in_features]
    return out.reshape(*index.shape, spec.in_features)
