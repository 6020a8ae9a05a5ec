"""Windows of a token stream in a file, as PyTorch's data loaders take them."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from tensorfold.data.tokens import begin

_STRETCH = 1 << 20  # tokens read from the stream at a time
_UNCOUNTED = -100  # the label that the losses of transformers and torch ignore


class TokenWindows(Dataset[dict[str, torch.Tensor]]):
    """Windows of a cached token stream, as items ``{"input_ids": (window_size,), "labels": (window_size,)}``.

    Both are int64 and equal, but for the prefix, whose labels are -100 so that it is never predicted. Labels are not
    shifted, since causal language models of transformers do so. The file is mapped anew in every process that the data
    set is sent to, so ``DataLoader`` workers are sent a path, not the tokens.

    Args:
        path: File with the token stream.
        dtype: Dtype of its token ids, ``uint16`` or ``uint32``.
        window_size: Tokens of a window, the prefix included.
        parts: Rows of windows, one behind the other: of each the place in the stream where its first window begins, and
            its number of windows.
        stride: Tokens from the first one of a window to the first one of the next of its row, in the stream; less than
            ``window_size`` less the prefix where windows overlap.
        prefix: Token ids that every window begins with.
    """

    def __init__(
        self,
        path: Path,
        dtype: str,
        window_size: int,
        parts: Sequence[tuple[int, int]],
        stride: int,
        prefix: tuple[int, ...] = (),
    ) -> None:
        self.path, self.dtype, self.window_size, self.prefix = path, dtype, window_size, prefix
        self.parts, self.stride = tuple(parts), stride
        self._ends = list(itertools.accumulate(count for _, count in self.parts))
        self._stream: np.memmap | None = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def begin_at(self, index: int) -> int:
        """Index in the stream of a window's first token, its prefix not counted."""
        row = bisect.bisect_right(self._ends, index)
        first, count = self.parts[row]
        return first + (index - self._ends[row] + count) * self.stride

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = self.begin_at(index % len(self))
        end = start + self.window_size - len(self.prefix)
        text = torch.from_numpy(self._mapped()[start:end].astype(np.int64))
        window = begin(self.prefix, text)  # (window_size,)
        labels = window.clone()
        labels[: len(self.prefix)] = _UNCOUNTED
        return {"input_ids": window, "labels": labels}

    def stretches(self, indices: Iterable[int]) -> Iterator[np.ndarray]:
        """Token ids of some windows without their prefixes, each token once, in the order of the stream.

        Args:
            indices: The windows' indices, in any order.

        Yields:
            Consecutive tokens, shape (length,); neighbouring windows are joined up to about a million tokens.
        """
        stream = self._mapped()
        first = end = 0
        for start in sorted(set(map(self.begin_at, indices))):
            if start > end or start - first >= _STRETCH:
                if end:
                    yield stream[first:end]
                first = start
            end = start + self.window_size - len(self.prefix)
        if end:
            yield stream[first:end]

    def _mapped(self) -> np.memmap:
        if self._stream is None:
            self._stream = np.memmap(self.path, dtype=self.dtype, mode="r")
        return self._stream

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stream": None}
