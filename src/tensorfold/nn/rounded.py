"""Cores of low-rank layers on the grid of a few bits, rounded together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tensorfold.algebra.solvers.rounding import Grid, rounded_factors
from tensorfold.nn.structured import StructuredLinear


@torch.no_grad()
def rounded_cores(module: nn.Module, grid: Grid) -> list[Tensor]:
    """Cores of a layer of two factors, with pivots or without, see :func:`rounded_factors`.

    Args:
        module: Any.
        grid: What a row of either factor may hold.

    Returns:
        In the shapes and dtypes of its cores; none where the module is not of that kind or its weights are elsewhere.
    """
    if not isinstance(module, StructuredLinear) or not module.spec.is_chain or module.scalars is not None:
        return []
    cores = module.cores.tensors()
    if len(cores) != 2 or any(core.is_meta for core in cores) or cores[0].shape[2] != 1 or cores[1].shape[1] != 1:
        return []
    rank = len(cores[1])
    if not all(core.numel() for core in cores) or cores[0].shape[0] != 1 or cores[0].shape[-1] != rank:
        return []
    factors = cores[0].reshape(-1, rank), cores[1].reshape(rank, -1)
    found = rounded_factors(*factors, module.spec.has_pivot_rows, grid)
    return [factor.reshape(core.shape) for factor, core in zip(found, cores, strict=True)]
