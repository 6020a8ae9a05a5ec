"""Symmetric matrices stored by their upper triangles, in little more than half the memory of the whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tensorfold.algebra.precision import solvable
from tensorfold.utils.atomic_files import write_file

_PANEL = 64  # rows


class Packed:
    """A symmetric sum of outer products, fp32, shape (size, size), packed into panels of 64 rows.

    Each panel stores its rows from the diagonal rightwards: 64 rows from column ``first`` on, where ``first`` is the
    panel's first row. A panel is one dense matrix, so no table of indices is needed, and adding takes half the
    multiplications of the whole matrix.

    Args:
        size: Rows, and columns.
        device: Where the sum is kept; the device of ``values`` where they are given.
        values: Packed values of another object of this size, shape (numbers(size),).
        path: File with packed values, as :meth:`spill` writes it; it is read at every use.
    """

    def __init__(
        self,
        size: int,
        device: torch.device | str = "cpu",
        values: Tensor | None = None,
        path: Path | None = None,
    ) -> None:
        self.size = size
        self.device = torch.device(device) if values is None else values.device
        self.path = path
        self._values = values
        if values is None and path is None:
            self._values = torch.zeros(numbers(size), device=device)

    @property
    def values(self) -> Tensor:
        """The panels one behind the other, shape (numbers(size),); read at every call where they are in a file.

        Raises:
            OSError: The file is gone, or too short.
        """
        if self._values is not None:
            return self._values
        assert self.path is not None
        values = np.fromfile(self.path, dtype=np.float32)
        if len(values) != numbers(self.size):
            raise OSError(f"{self.path}: {len(values)} numbers; needed {numbers(self.size)}.")
        return torch.from_numpy(values).to(self.device)

    def add(self, vectors: Tensor) -> None:
        """Add ``vectorsᵀ vectors``, (size, size), of vectors with shape (tokens, size)."""
        assert self._values is not None  # nothing can be added to values in a file
        for rows, panel in self._panels(self._values):
            panel.addmm_(vectors[:, rows].T, vectors[:, rows.start :])

    def divide(self, by: float) -> None:
        """Divide the whole matrix by a number."""
        assert self._values is not None
        self._values.div_(by)

    def spill(self, path: Path) -> None:
        """Move the values to a file, and free their memory; nothing can be added any more.

        Raises:
            InputError: The file cannot be written.
            TensorfoldError: The disk is full.
        """
        write_file(path, self.values.cpu().numpy().tobytes())
        self.path, self._values = path, None

    def full(self, scale: float = 1.0) -> Tensor:
        """The whole matrix times ``scale``, shape (size, size), exactly symmetric, where it can be decomposed."""
        values = solvable(self.values)
        out = values.new_empty(self.size, self.size)
        for rows, panel in self._panels(values):
            part = panel * scale  # (rows, size − first row)
            out[rows.start :, rows] = part.T
            out[rows, rows.start :] = part
            square = out[rows, rows].triu()
            out[rows, rows] = square + square.triu(1).T
        return out

    def _panels(self, values: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Each panel's rows as a slice, and its numbers, shape (rows, size − first row)."""
        start = 0
        for first in range(0, self.size, _PANEL):
            shape = min(_PANEL, self.size - first), self.size - first
            yield slice(first, first + shape[0]), values[start : start + shape[0] * shape[1]].view(shape)
            start += shape[0] * shape[1]


def numbers(size: int) -> int:
    """Number of values that a packed matrix of shape (size, size) stores."""
    return sum(min(_PANEL, size - first) * (size - first) for first in range(0, size, _PANEL))
