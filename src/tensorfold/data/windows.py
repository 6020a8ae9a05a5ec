"""Windows of a token stream in a file, as PyTorch's data loaders take them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
        first: Index in the stream of the first window's first token.
        length: Number of windows.
        stride: Tokens from the first one of a window to the first one of the next, in the stream; less than
            ``window_size`` less the prefix where windows overlap.
        prefix: Token ids that every window begins with.
    """

    def __init__(
        self,
        path: Path,
        dtype: str,
        window_size: int,
        first: int,
        length: int,
        stride: int,
        prefix: tuple[int, ...] = (),
    ) -> None:
        self.path, self.dtype, self.window_size, self.prefix = path, dtype, window_size, prefix
        self.first, self.length, self.stride = first, length, stride
        self._stream: np.memmap | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -self.length <= index < self.length:
            raise IndexError(f"window {index} of {self.length}")
        start = self.first + index % self.length * self.stride
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
        for start in sorted({self.first + index * self.stride for index in indices}):
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
