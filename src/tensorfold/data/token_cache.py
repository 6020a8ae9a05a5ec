"""Training text: streamed, tokenised once into a memory-mapped file, cut into blocks.

The cached file is one flat stream of token ids, ``document eos document eos …``. Every block begins with the ``p``
tokens that the tokenizer puts before a document, which are not in the stream: block ``i`` of size ``b`` is they and
``stream[i*(b-p) : (i+1)*(b-p)]``, so one cache serves every block size. Nothing larger than a few megabytes of text or
tokens is ever held in memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from torch.utils.data import Dataset

from tensorfold.data.documents import Files, Hub, Source, Text, find_texts, iter_pieces
from tensorfold.data.encode import Encoder, encode_all, tokenizer_fingerprint
from tensorfold.data.tokens import begin, prefix_of
from tensorfold.errors import InputError, TensorfoldError, pass_on_memory
from tensorfold.utils.atomic_files import atomic_directory, cache_directory
from tensorfold.utils.fingerprints import hash_file

_FORMAT = 2
_STRETCH = 1 << 20
_TOKENS, _SIDECAR = "tokens.bin", "cache.json"
_UNCOUNTED = -100  # the label that losses of transformers and torch leave out

logger = logging.getLogger(__name__)


class TokenBlocks(Dataset[dict[str, torch.Tensor]]):
    """Blocks of a cached token stream, as items ``{"input_ids": (block_size,), "labels": (block_size,)}``.

    Both are int64 and equal, but for the prefix, whose labels are -100 and so never predicted: causal language models
    of transformers shift the labels themselves. The file is mapped anew in every process the data set is sent to, so
    ``DataLoader`` workers get a path, not the tokens.

    Args:
        first: Token of the stream that the first block's text begins with.
        length: Number of blocks.
        stride: Tokens from the beginning of a block's text to that of the next; as many as it has where they do not
            overlap.
        prefix: Token ids that every block begins with, before its text; they are among its ``block_size`` tokens.
    """

    def __init__(
        self,
        path: Path,
        dtype: str,
        block_size: int,
        first: int,
        length: int,
        stride: int,
        prefix: tuple[int, ...] = (),
    ) -> None:
        self.path, self.dtype, self.block_size, self.prefix = path, dtype, block_size, prefix
        self.first, self.length, self.stride = first, length, stride
        self._stream: np.memmap | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -self.length <= index < self.length:
            raise IndexError(f"block {index} of {self.length}")
        if self._stream is None:
            self._stream = np.memmap(self.path, dtype=self.dtype, mode="r")
        start = self.first + index % self.length * self.stride
        end = start + self.block_size - len(self.prefix)
        text = torch.from_numpy(self._stream[start:end].astype(np.int64))
        block = begin(self.prefix, text)  # (block_size,)
        labels = block.clone()
        labels[: len(self.prefix)] = _UNCOUNTED
        return {"input_ids": block, "labels": labels}

    def stretches(self, indices: Iterable[int]) -> Iterator[np.ndarray]:
        """The text of some blocks, that of neighbours in one piece of at most a million tokens; shape (length,)."""
        if self._stream is None:
            self._stream = np.memmap(self.path, dtype=self.dtype, mode="r")
        first = end = 0
        for start in sorted({self.first + index * self.stride for index in indices}):
            if start > end or start - first >= _STRETCH:
                if end:
                    yield self._stream[first:end]
                first = start
            end = start + self.block_size - len(self.prefix)
        if end:
            yield self._stream[first:end]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stream": None}


@dataclass(frozen=True)
class TokenCache:
    """A tokenised text on disk, seen as blocks for training and validation.

    Args:
        path: Directory with ``tokens.bin`` and its sidecar ``cache.json``.
        key: Identity of text and tokenizer; equal keys mean equal tokens and an equal prefix.
        label: The text's name, for logs and reports.
        tokens: Length of the whole stream.
        dtype: ``uint16``, or ``uint32`` for vocabularies that need it.
        block_size: Tokens a block.
        validation_fraction: Share of the blocks, from the end, that is kept from training; at least one block when
            there are two. 0 keeps none.
        prefix: Token ids that every block begins with: what the tokenizer puts before a document.
        largest: Largest token id in the stream and the prefix.

    Raises:
        InputError: The text is too short for one block, or a number is out of range.
    """

    path: Path
    key: str
    label: str
    tokens: int
    dtype: str
    block_size: int
    validation_fraction: float = 0.01
    prefix: tuple[int, ...] = ()
    largest: int = 0

    def __post_init__(self) -> None:
        _check_blocks(self.block_size, self.validation_fraction, len(self.prefix))
        if self.tokens < self._text_size:
            raise InputError(
                f"text {self.label!r} has {self.tokens} tokens, and one block needs {self._text_size}; "
                f"give more text, or a block size of at most {self.tokens + len(self.prefix)}"
            )

    @property
    def _text_size(self) -> int:
        """Tokens of the stream in a block."""
        return self.block_size - len(self.prefix)

    @property
    def blocks(self) -> int:
        """Whole blocks in the stream; the rest, shorter than one block, is left out."""
        return self.tokens // self._text_size

    @property
    def train(self) -> TokenBlocks:
        """Every block but the last ones."""
        return self._view(0, self.blocks - self._validation_blocks)

    @property
    def train_anywhere(self) -> TokenBlocks:
        """A block from every token of the same text on; they overlap."""
        starts = (self.blocks - self._validation_blocks - 1) * self._text_size + 1
        return TokenBlocks(self.path / _TOKENS, self.dtype, self.block_size, 0, starts, 1, self.prefix)

    @property
    def validation(self) -> TokenBlocks:
        """The last ``validation_fraction`` of the blocks."""
        return self._view(self.blocks - self._validation_blocks, self._validation_blocks)

    @property
    def _validation_blocks(self) -> int:
        if not self.validation_fraction or self.blocks < 2:
            return 0
        return max(1, int(self.blocks * self.validation_fraction))

    def _view(self, first: int, length: int) -> TokenBlocks:
        size = self._text_size
        return TokenBlocks(self.path / _TOKENS, self.dtype, self.block_size, first * size, length, size, self.prefix)

    @classmethod
    def build(
        cls,
        source: Source,
        tokenizer: Any,
        block_size: int,
        *,
        split: str = "train",
        cache_dir: str | os.PathLike[str] | None = None,
        validation_fraction: float = 0.01,
        workers: int = 1,
        max_tokens: int | None = None,
        expect_key: str | None = None,
    ) -> Self:
        """Tokenise a text once, or find the tokens of an earlier call with the same text and tokenizer.

        With several ranks call it under ``accelerator.main_process_first()``. Ranks that build at the same time all
        do the work, and the first result stays.

        Args:
            source: A text as :func:`tensorfold.data.texts.load_text` takes it, or several, one after the other.
            tokenizer: A transformers tokenizer. Documents end with its EOS; without one, with a blank line. What it
                puts before a document by default is what every block begins with.
            block_size: Tokens a block, those included; not part of the cache's identity.
            split: Split of a named text.
            cache_dir: Where caches are kept; ``cache_directory("tokens")`` by default.
            workers: Processes that tokenise. The tokens do not depend on their number.
            max_tokens: Stop after this many tokens, for texts too large to store.
            expect_key: Key that a resumed run was started with.

        Raises:
            InputError: No such text, one too short for a block, or ``expect_key`` is not the key of this text.
            TensorfoldError: The disk is full, a file changed while it was read, or a worker died.
        """
        prefix = prefix_of(tokenizer)
        _check_blocks(block_size, validation_fraction, len(prefix))
        if workers < 1 or (max_tokens is not None and max_tokens < 1):
            raise InputError(f"got workers={workers} and max_tokens={max_tokens}; both must be at least 1")
        texts = find_texts(source, split)
        directory = cache_directory("tokens") if cache_dir is None else Path(cache_dir)
        identity: dict[str, Any] = {
            "format": _FORMAT,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "max_tokens": max_tokens,
            "texts": [text.identity() for text in texts],
        }
        if prefix:
            identity["prefix"] = list(prefix)
        if any(isinstance(text, Hub) and text.revision is None for text in texts):
            identity = _latest_known(directory, identity) or identity
        key, label = _key(identity), _label(texts)
        _check_key(key, expect_key, label)
        path = directory / key
        damaged = False
        if path.exists():
            try:
                sidecar = _checked_sidecar(path)
            except InputError as error:
                logger.warning("%s; building it again now", error)
                damaged = True
        if damaged or not path.exists():
            _store(path, texts, Encoder.of(tokenizer), identity, workers, replace=damaged)
            sidecar = _checked_sidecar(path)
        return cls._of(path, sidecar | {"label": label}, block_size, validation_fraction)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        expect_key: str | None = None,
        block_size: int = 1024,
        validation_fraction: float = 0.01,
    ) -> Self:
        """Open the cache in directory ``path``, checking it against its sidecar.

        Args:
            expect_key: Key that a resumed run was started with.

        Raises:
            InputError: No cache there, a damaged one, or one of another key.
        """
        sidecar = _checked_sidecar(Path(path))
        _check_key(sidecar["key"], expect_key, sidecar["label"])
        return cls._of(Path(path), sidecar, block_size, validation_fraction)

    @classmethod
    def _of(cls, path: Path, sidecar: dict[str, Any], block_size: int, validation_fraction: float) -> Self:
        own = {name: sidecar[name] for name in ("key", "label", "tokens", "dtype", "prefix", "largest")}
        return cls(path, block_size=block_size, validation_fraction=validation_fraction, **own)


def _checked_sidecar(path: Path) -> dict[str, Any]:
    try:
        sidecar = json.loads((path / _SIDECAR).read_text(encoding="utf-8"))
        size = sidecar["tokens"] * np.dtype(sidecar["dtype"]).itemsize
        found = (path / _TOKENS).stat().st_size
        if found != size:
            raise ValueError(f"{_TOKENS} has {found} bytes instead of {size}")
        # All of it, at every start: it takes no longer than reading the text, whose own hash names the cache.
        if hash_file(path / _TOKENS) != sidecar["sha256"]:
            raise ValueError(f"the checksum of {_TOKENS} differs")
        prefix = tuple(sidecar["identity"].get("prefix", ()))
        return {
            **{name: sidecar[name] for name in ("key", "label", "tokens", "dtype")},
            "prefix": prefix,
            "largest": max([sidecar["largest"], *prefix]),
        }
    except OSError as error:
        pass_on_memory(error)
        raise InputError(
            f"{path} is no token cache: {error.filename}: {error.strerror}; build it again from its text"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"token cache {path} is damaged ({error}); delete it and build it again from its text"
        ) from error


def _store(
    path: Path, texts: list[Text], encoder: Encoder, identity: dict[str, Any], workers: int, *, replace: bool
) -> None:
    with atomic_directory(path, replace=replace, keep_existing=not replace) as temporary:
        written = _write(temporary / _TOKENS, texts, encoder, workers, identity["max_tokens"])
        if any(text.changed() for text in texts):
            raise TensorfoldError(f"text {_label(texts)!r} changed while it was tokenised; run the command again")
        sidecar = {
            "key": _key(identity),
            "label": _label(texts),
            "dtype": encoder.dtype,
            **written,
            "files": [
                {"path": str(file), "bytes": file.stat().st_size}
                for text in texts
                if isinstance(text, Files)
                for file in text.paths
            ],
            "identity": identity,
        }
        (temporary / _SIDECAR).write_text(json.dumps(sidecar, indent=2) + "\n", encoding="utf-8")


def _write(
    path: Path, texts: list[Text], encoder: Encoder, workers: int, max_tokens: int | None
) -> dict[str, int | str]:
    """Tokenise everything into ``path``; the number of tokens, the largest of them, and the SHA-256 of their bytes."""
    tokens, largest, digest = 0, 0, hashlib.sha256()
    console = Console(stderr=True)
    columns = (
        TextColumn("tokenising {task.description}: {task.completed:,.0f} tokens", markup=False),
        TimeElapsedColumn(),
    )
    pieces = (piece for text in texts for piece in iter_pieces(text))
    with (
        path.open("wb") as file,
        closing(encode_all(pieces, encoder, workers)) as arrays,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task(_label(texts), total=None)
        for array in arrays:
            if max_tokens is not None:
                array = array[: max_tokens - tokens]
            file.write(array.data)
            digest.update(array.data)
            tokens += len(array)
            largest = max(largest, int(array.max(initial=0)))
            progress.update(task, completed=tokens)
            if tokens == max_tokens:
                break
    if not tokens:
        raise InputError(f"text {_label(texts)!r} is empty; give another text")
    return {"tokens": tokens, "largest": largest, "sha256": digest.hexdigest()}


def _key(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _label(texts: list[Text]) -> str:
    return " + ".join(text.label for text in texts)


def _latest_known(directory: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Identity of the newest cache of the same hub data set, whatever its revision: what can be had without network."""
    known = []
    for sidecar in directory.glob(f"*/{_SIDECAR}"):
        try:
            found = json.loads(sidecar.read_text(encoding="utf-8"))["identity"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            pass_on_memory(error)
            continue
        if _without_revisions(found) == _without_revisions(identity):
            known.append((sidecar.stat().st_mtime_ns, found))
    return max(known, key=lambda entry: entry[0])[1] if known else None


def _without_revisions(identity: dict[str, Any]) -> dict[str, Any]:
    texts = [text | {"revision": None} if isinstance(text, dict) else text for text in identity.get("texts", ())]
    return identity | {"texts": texts}


def _check_blocks(block_size: int, validation_fraction: float, prefix: int) -> None:
    if block_size < max(2, prefix + 1):
        raise InputError(
            f"got block_size={block_size}; a block needs at least {max(2, prefix + 1)} tokens to predict one from the "
            f"other{f', {prefix} of them from before every document' if prefix else ''}"
        )
    if not 0 <= validation_fraction < 1:
        raise InputError(f"got validation_fraction={validation_fraction}; needed at least 0 and less than 1")


def _check_key(key: str, expected: str | None, label: str) -> None:
    if expected is not None and key != expected:
        raise InputError(
            f"the text or its tokenizer changed: text {label!r} now has the key {key}, and the run to resume was "
            f"started with {expected}; bring back the older text, or start a new run in another directory"
        )
