"""Applying an operator to one vector again and again, as generating text does, with all that can be prepared prepared.

A single vector takes microseconds, as long as Python takes to look up sizes and orders. What does not change between
two calls, views of the cores above all, is therefore made once, as a function of the vector alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorfold.algebra.contraction.forms import multiply
from tensorfold.algebra.contraction.paths import Chain, ContractionPath, Form
from tensorfold.algebra.contraction.pivots import read_first

OfVector = Callable[[Tensor], Tensor]


def of_pivots(
    others: Tensor,
    pivots: Tensor,
    position: Tensor,
    first: int | None,
    in_order: Tensor | None,
    bias: Tensor | None,
    axes: int,
) -> OfVector:
    """``[I; T] S x + bias`` of one vector, outputs in their own order.

    Args:
        others: T, (others, r).
        pivots: S, (r, in).
        position: Row of [I; T] of each output, (out,); one behind the last for outputs that are zero.
        first: Output at which all pivots begin, from :func:`.pivots.first_of_pivots`; None to go by ``position``.
        in_order: Input that each column of S reads, (columns,); None where they are all, in their own order.
        bias: Shape (out,) or None.
        axes: Number of the vector's axes; all but the last have size 1.
    """
    lead, linear, cat, reads = (1,) * (axes - 1), F.linear, torch.cat, read_first(in_order)
    place, zeros, before = position.reshape(*lead, -1), len(position) - len(others) - len(pivots), first or 0
    zero = others.new_zeros(*lead, 1 if first is None else zeros) if zeros else None

    def outputs(x: Tensor) -> Tensor:
        if in_order is not None:
            x = x.index_select(-1, in_order) if reads is None else x[..., :reads]
        known = linear(x, pivots)
        mixed = linear(known, others)
        parts = [mixed[..., :before], known, mixed[..., before:]] if before else [known, mixed]
        if zero is not None:
            parts.append(zero)
        y = cat(parts, -1)
        if first is None:
            y = y.take(place)
        return y if bias is None else y.add_(bias)

    return _by_own_loop(outputs, others.dtype)


def of_part(matrix: Tensor, position: Tensor | None, in_order: Tensor | None, bias: Tensor | None) -> OfVector | None:
    """``x Wᵀ + bias`` of any number of vectors, where W has a ``matrix`` in its corner and zeros around it.

    Args:
        matrix: Shape (rows, columns).
        position: Row of each output, (out,); one behind the last for outputs that are zero; None where none is.
        in_order: Input that each column reads, (columns,); None where they are all.
        bias: Shape (out,) or None.

    Returns:
        None where rows or columns are stored in an order of their own.
    """
    rows, reads = len(matrix), read_first(in_order)
    zeros = 0 if position is None else len(position) - rows
    runs = position is None or torch.equal(position, torch.arange(len(position)).clamp_max(rows).to(position.device))
    if not runs or (reads is None) != (in_order is None):
        return None

    def outputs(x: Tensor) -> Tensor:
        y = F.linear(x if reads is None else x[..., :reads], matrix)
        y = F.pad(y, (0, zeros)) if zeros else y
        return y if bias is None else y.add_(bias)

    return outputs


def of_chain(
    matrices: Sequence[Tensor], spec: Chain, path: ContractionPath, bias: Tensor | None, axes: int
) -> OfVector | None:
    """``W x + bias`` of one vector along a path; None where the path has more to do than one product a core.

    Args:
        matrices: Cores of the steps as matrices (d, c), views of the stored ones.
        spec: Shape of the chain.
        path: Its steps.
        bias: Shape (out,) or None.
        axes: Number of the vector's axes; all but the last have size 1.
    """
    last = path.steps[-1]
    if math.prod(spec.in_modes) != spec.in_features or math.prod(spec.out_modes) != spec.out_features:
        return None
    if all(step.form == Form.ROWS and step.left == step.block == 1 and not step.permutation for step in path.steps):
        *before, final = matrices
        linear = F.linear

        def rows(x: Tensor) -> Tensor:
            for matrix in before:
                x = linear(x, matrix)
            return linear(x, final, bias)

        return _by_own_loop(rows, final.dtype) if all(m.is_contiguous() for m in matrices) else rows
    steps, permutation = list(zip(matrices, path.steps, strict=True)), path.permutation
    fused = bias if last.form == Form.ROWS and last.d == spec.out_features and permutation is None else None
    order = None if permutation is None else [1 + k for k in permutation]
    shape = (*(1,) * (axes - 1), spec.out_features)

    def outputs(x: Tensor) -> Tensor:
        for matrix, step in steps:
            x = multiply(x, matrix, step, 1, fused if step is last else None)
        if order is not None:
            x = x.reshape(1, *path.outputs).permute(0, *order)
        y = x.reshape(shape)
        return y if bias is None or fused is not None else y + bias

    return outputs


def _by_own_loop(function: OfVector, dtype: torch.dtype) -> OfVector:
    """The function, in bf16 without oneDNN.

    oneDNN, which PyTorch calls for bf16 on a processor, takes about 25 µs to set a product out; PyTorch's own loop has
    multiplied a vector by a matrix of 200 × 576 by then.
    """
    if dtype is not torch.bfloat16:
        return function
    switch, is_on = torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled

    def without(x: Tensor) -> Tensor:
        if not is_on():
            return function(x)
        switch(False)
        try:
            return function(x)
        finally:
            switch(True)  # not what was found: another thread may be in here as well

    return without
