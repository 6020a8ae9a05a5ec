"""A symmetric matrix by its upper half: little over half its memory, for second moments that are kept for long."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tensorfold.utils.atomic_files import write_file

_PANEL = 64  # rows


class Packed:
    """A sum of outer products, (size, size), fp32, in panels of 64 rows: of each, what is not left of the diagonal.

    Panels need no table of indices, which would be as large as the matrix, and a sum takes half the work of a whole.

    Args:
        values: Those of an equal object, ``numbers(size)`` of them.
        path: A file with such values, as :meth:`spill` writes it, that is read at every use.
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
        """The panels, one behind the other, shape (numbers(size),); read anew at every call where they are in a file.

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
        """Add ``vectorsᵀ vectors`` of vectors (n, size)."""
        assert self._values is not None  # a file's would be lost
        for rows, panel in self._panels(self._values):
            panel.addmm_(vectors[:, rows].T, vectors[:, rows.start :])

    def divide(self, by: float) -> None:
        """Divide all numbers."""
        assert self._values is not None
        self._values.div_(by)

    def spill(self, path: Path) -> None:
        """Keep the values in a file from now on; nothing can be added any more.

        Raises:
            InputError: The file cannot be written.
            TensorfoldError: The disk is full.
        """
        write_file(path, self.values.cpu().numpy().tobytes())
        self.path, self._values = path, None

    def full(self, scale: float = 1.0) -> Tensor:
        """``scale`` times the whole matrix; exactly symmetric."""
        values = self.values
        out = values.new_empty(self.size, self.size)
        for rows, panel in self._panels(values):
            part = panel * scale
            out[rows.start :, rows] = part.T
            out[rows, rows.start :] = part
            square = out[rows, rows].triu()
            out[rows, rows] = square + square.triu(1).T
        return out

    def _panels(self, values: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows and columns of each panel on the diagonal, and its numbers, (rows, size − first row)."""
        start = 0
        for first in range(0, self.size, _PANEL):
            shape = min(_PANEL, self.size - first), self.size - first
            yield slice(first, first + shape[0]), values[start : start + shape[0] * shape[1]].view(shape)
            start += shape[0] * shape[1]


def numbers(size: int) -> int:
    """How many are stored of a matrix (size, size)."""
    return sum(min(_PANEL, size - first) * (size - first) for first in range(0, size, _PANEL))
