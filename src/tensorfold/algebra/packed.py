"""A symmetric matrix by its upper triangle: half the memory of the whole, for second moments that are kept for long."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from tensorfold.memory import release_file_pages


class Packed:
    """A sum of outer products, (size, size), fp32, stored as size · (size + 1) / 2 numbers."""

    def __init__(self, size: int, device: torch.device | str = "cpu", values: Tensor | None = None) -> None:
        self.size = size
        self.values = torch.zeros(size * (size + 1) // 2, device=device) if values is None else values

    def add(self, vectors: Tensor) -> None:
        """Add ``vectorsᵀ vectors`` of vectors (n, size)."""
        self.values += (vectors.T @ vectors).flatten()[_upper(self.size, self.values.device)]

    def spill(self, path: Path) -> None:
        """Keep the values in a file from now on, mapped to memory when they are asked for."""
        mapped = torch.from_file(str(path), shared=True, size=self.values.numel())
        mapped.copy_(self.values)
        self.values = mapped
        release_file_pages(mapped)

    def full(self, scale: float = 1.0) -> Tensor:
        """``scale`` times the whole matrix."""
        out = self.values.new_empty(self.size, self.size)
        out.view(-1)[_upper(self.size, self.values.device)] = self.values * scale
        lower = torch.ones(self.size, self.size, dtype=torch.bool, device=out.device).tril_(-1)
        out[lower] = out.T[lower]
        return out


@lru_cache(maxsize=8)
def _upper(size: int, device: torch.device) -> Tensor:
    """Flat indices of the upper triangle, row by row."""
    rows, columns = torch.triu_indices(size, size, device=device)
    return rows * size + columns
