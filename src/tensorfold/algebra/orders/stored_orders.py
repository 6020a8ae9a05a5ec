"""How many bytes an order of rows or columns takes where it is stored: whole numbers of the smallest type that fits."""

from __future__ import annotations

import torch

_TYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


def order_dtype(largest: int) -> torch.dtype:
    """The smallest integer type that holds every number from 0 to ``largest``.

    >>> order_dtype(255), order_dtype(256), order_dtype(50257)
    (torch.uint8, torch.int16, torch.int32)
    """
    return next(dtype for dtype in _TYPES if largest <= torch.iinfo(dtype).max)


def order_bytes(count: int, largest: int) -> int:
    """Bytes of ``count`` numbers from 0 to ``largest``."""
    return count * order_dtype(largest).itemsize
