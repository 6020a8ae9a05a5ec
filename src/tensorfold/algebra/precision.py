"""The dtypes that products are taken in.

float16 ends at 65,504. What lies between two factors may pass that where the result, and a dense layer, do not: so
chains in float16 are computed in float32, and rounded once, at their end. bfloat16 and float32 reach to 3·10³⁸.

Matrices are decomposed in float64. Where a device has none, as Apple's MPS, they are decomposed on the CPU:
:func:`solvable` alone decides that, for weights and moments on their way into a solver.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tensorfold.errors import pass_on_memory


def product_dtype(x: Tensor) -> torch.dtype:
    """Dtype of a dense layer's product with ``x``: that of ``x``, or the one that autocast chose."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x.device.type) else x.dtype


def wide(dtype: torch.dtype) -> torch.dtype:
    """Dtype that the numbers between two factors of ``dtype`` fit in: float32 for float16, else ``dtype`` itself."""
    return torch.float32 if dtype is torch.float16 else dtype


def autocasts(kind: str) -> bool:
    """Whether autocast is on for a kind of device, such as ``"cuda"``; not every kind knows it."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


@functools.cache
def has_float64(kind: str) -> bool:
    """Whether a kind of device, such as ``"cuda"``, computes in float64; found by trying."""
    try:
        one = torch.ones((), dtype=torch.float64, device=kind)
        return bool((one + one).item() == 2)
    except (RuntimeError, TypeError) as error:  # TypeError is what MPS raises
        pass_on_memory(error)
        return False


def solvable(tensor: Tensor) -> Tensor:
    """The tensor where it can be decomposed in float64: on its own device, or copied to the CPU if that has none."""
    return tensor if tensor.is_meta or has_float64(tensor.device.type) else tensor.cpu()


def autocast(kind: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Context in which a kind of device takes products in ``dtype``; None, as the operands are, on every kind."""
    return nullcontext() if dtype is None else torch.autocast(kind, dtype)


def as_given(kind: str) -> AbstractContextManager[Any]:
    """Context without autocast on this kind of device: products are taken in the dtype of their operands."""
    return torch.autocast(kind, enabled=False) if autocasts(kind) else nullcontext()
