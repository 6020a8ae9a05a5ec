"""From text to token ids: which tokenizer, with which separator, in how many processes."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from tensorfold.data.documents import Piece
from tensorfold.errors import TensorfoldError
from tensorfold.utils.fingerprints import hash_file

_BATCH = 1 << 20  # characters tokenised at a time: about 250 thousand tokens


@dataclass(frozen=True)
class Encoder:
    """From pieces of text to token ids, with a separator after every document and nothing before it.

    What the tokenizer puts before a document belongs to the blocks that are cut from the stream, not to the stream.
    """

    tokenizer: Any
    separator: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tokenizer: Any) -> Self:
        """Separate by EOS, or by a blank line where the tokenizer has none; 16 bits where the vocabulary allows."""
        if tokenizer.eos_token_id is not None:
            separator = [tokenizer.eos_token_id]
        else:
            separator = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
        largest = max([*separator, *tokenizer.get_vocab().values()])
        return cls(tokenizer, tuple(separator), "uint16" if largest <= np.iinfo(np.uint16).max else "uint32")

    def __call__(self, batch: list[Piece]) -> np.ndarray:
        """Ids of all pieces as one array, shape ``(tokens,)``."""
        rows = self.tokenizer(
            [piece.text for piece in batch],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # pieces are longer than any model's context, on purpose
        )["input_ids"]
        parts = []
        for piece, row in zip(batch, rows, strict=True):
            parts.append(np.array(row, dtype=self.dtype))
            if piece.ends_document:
                parts.append(np.array(self.separator, dtype=self.dtype))
        return np.concatenate(parts)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of what decides which ids a text gets: the backend's state, or for one without, its class and vocabulary.

    The settings of a tokenizer in Python are not in it, but for its separator and how it splits special tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # Left over from earlier calls of the tokenizer; none of them reaches this one.
        state["truncation"] = state["padding"] = None
    else:
        state = [type(tokenizer).__qualname__, sorted(tokenizer.get_vocab().items()), _files_and_settings(tokenizer)]
    described = [state, tokenizer.eos_token_id, bool(getattr(tokenizer, "split_special_tokens", False))]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _files_and_settings(tokenizer: Any) -> list[Any]:
    """What a tokenizer written in Python has beside its vocabulary: merges, models, options, wherever they lie."""
    given = getattr(tokenizer, "init_kwargs", {})
    settings = {key: str(value) for key, value in given.items() if key != "name_or_path" and not key.endswith("_file")}
    with tempfile.TemporaryDirectory() as directory:
        with suppress(AttributeError, NotImplementedError):
            tokenizer.save_vocabulary(directory)
        files = {path.name: hash_file(path) for path in Path(directory).iterdir()}
    return [sorted(settings.items()), sorted(files.items())]


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def encode_all(pieces: Iterable[Piece], encoder: Encoder, workers: int) -> Generator[np.ndarray, None, None]:
    """Ids of all pieces in their order, as arrays of a few hundred thousand; at most two batches a worker under way.

    Raises:
        TensorfoldError: A worker was killed.
    """
    batches = _batches(pieces)
    if workers == 1:
        yield from map(encoder, batches)
        return
    pending: deque[Future[np.ndarray]] = deque()
    try:
        with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(encoder,)) as pool:
            for batch in batches:
                pending.append(pool.submit(_encode_in_worker, batch))
                if len(pending) >= 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise TensorfoldError(
            f"one of {workers} tokenising processes was killed, probably for want of memory; use fewer workers"
        ) from error


_worker_encoder: Encoder


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process a worker is enough
    _worker_encoder = encoder


def _encode_in_worker(batch: list[Piece]) -> np.ndarray:
    return _worker_encoder(batch)
