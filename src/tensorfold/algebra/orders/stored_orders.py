"""Size of an order of rows or columns where it is stored: whole numbers of the smallest type that fits."""

from __future__ import annotations

import torch

_TYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


def order_dtype(largest: int) -> torch.dtype:
    """Smallest integer type that holds every number from 0 to ``largest``.

    >>> order_dtype(255), order_dtype(256), order_dtype(50257)
    (torch.uint8, torch.int16, torch.int32)
    """
    return next(dtype for dtype in _TYPES if largest <= torch.iinfo(dtype).max)


def order_bytes(count: int, largest: int) -> int:
    """Bytes that ``count`` numbers from 0 to ``largest`` take where they are stored."""
    return count * order_dtype(largest).itemsize
