"""The dtypes that products are taken in.

float16 ends at 65,504. What lies between two factors may pass that where the result, and a dense layer, do not: so
chains in float16 are computed in float32, and rounded once, at their end. bfloat16 and float32 reach to 3·10³⁸.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """Dtype of a dense layer's product with ``x``: that of ``x``, or the one that autocast chose."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x.device.type) else x.dtype


def wide(dtype: torch.dtype) -> torch.dtype:
    """Dtype that the numbers between two factors of ``dtype`` fit in: float32 for float16, else ``dtype`` itself."""
    return torch.float32 if dtype is torch.float16 else dtype


def autocasts(kind: str) -> bool:
    """Whether autocast is on for a kind of device, such as ``"cuda"``; not every kind knows it."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def as_given(kind: str) -> AbstractContextManager[Any]:
    """Context without autocast on this kind of device: products are taken in the dtype of their operands."""
    return torch.autocast(kind, enabled=False) if autocasts(kind) else nullcontext()
