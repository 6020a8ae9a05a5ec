"""A symmetric matrix by its upper triangle: half the memory of the whole, for second moments that are kept for long."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class Packed:
    """A sum of outer products, (size, size), fp32, stored as size · (size + 1) / 2 numbers."""

    def __init__(self, size: int, device: torch.device | str = "cpu", values: Tensor | None = None) -> None:
        self.size = size
        self._values = torch.zeros(size * (size + 1) // 2, device=device) if values is None else values
        self._path: Path | None = None

    @property
    def values(self) -> Tensor:
        """The upper triangle, row by row; read anew at every call where it is in a file."""
        if self._path is None:
            return self._values
        return torch.from_numpy(np.fromfile(self._path, dtype=np.float32))

    def add(self, vectors: Tensor) -> None:
        """Add ``vectorsᵀ vectors`` of vectors (n, size)."""
        self._values += (vectors.T @ vectors).flatten()[_upper(self.size, self._values.device)]

    def divide(self, by: float) -> None:
        """Divide all numbers."""
        self._values /= by

    def spill(self, path: Path) -> None:
        """Keep the values in a file from now on; nothing can be added any more."""
        self._values.cpu().numpy().tofile(path)
        self._path, self._values = path, torch.empty(0)

    def full(self, scale: float = 1.0) -> Tensor:
        """``scale`` times the whole matrix."""
        values = self.values
        out = values.new_empty(self.size, self.size)
        out.view(-1)[_upper(self.size, values.device)] = values * scale
        lower = torch.ones(self.size, self.size, dtype=torch.bool, device=out.device).tril_(-1)
        out[lower] = out.T[lower]
        return out


@lru_cache(maxsize=8)
def _upper(size: int, device: torch.device) -> Tensor:
    """Flat indices of the upper triangle, row by row."""
    rows, columns = torch.triu_indices(size, size, device=device)
    return rows * size + columns
