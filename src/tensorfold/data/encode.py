"""Training text to one stream of token ids, in one process or several."""

from __future__ import annotations

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
from tensorfold.utils.fingerprints import hash_file, hash_json

_BATCH = 1 << 20  # characters tokenised at a time: about 250 thousand tokens


@dataclass(frozen=True)
class StreamEncoder:
    """Pieces of text to token ids, with a separator after every document and nothing before it.

    What the tokenizer puts before a document belongs to the windows that are cut from the stream, not to the stream.

    Attributes:
        tokenizer: A transformers tokenizer.
        separator: Token ids between documents.
        dtype: Name of the ids' dtype, ``uint16`` or ``uint32``.
    """

    tokenizer: Any
    separator: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tokenizer: Any) -> Self:
        """The encoder for a tokenizer: documents end with its EOS token, or with a blank line where it has none.

        Ids are stored in 16 bits where the vocabulary is small enough.
        """
        if tokenizer.eos_token_id is not None:
            separator = [tokenizer.eos_token_id]
        else:
            separator = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
        largest = max([*separator, *tokenizer.get_vocab().values()])
        return cls(tokenizer, tuple(separator), "uint16" if largest <= np.iinfo(np.uint16).max else "uint32")

    def __call__(self, batch: list[Piece]) -> np.ndarray:
        """Token ids of all pieces as one array, shape (tokens,)."""
        rows = self.tokenizer(
            [piece.text for piece in batch],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning that a piece is longer than the model's context, as it may be
        )["input_ids"]
        parts = []
        for piece, row in zip(batch, rows, strict=True):
            parts.append(np.array(row, dtype=self.dtype))
            if piece.ends_document:
                parts.append(np.array(self.separator, dtype=self.dtype))
        return np.concatenate(parts)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of everything that decides which token ids a text gets.

    That is the state of the backend of a fast tokenizer; of a tokenizer written in Python its class, vocabulary, files
    and the settings that it was made with; of both, the EOS token and whether special tokens are split.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # Left over from earlier calls of the tokenizer; encoding sets its own.
        state["truncation"] = state["padding"] = None
    else:
        state = [type(tokenizer).__qualname__, sorted(tokenizer.get_vocab().items()), _files_and_settings(tokenizer)]
    described = [state, tokenizer.eos_token_id, bool(getattr(tokenizer, "split_special_tokens", False))]
    return hash_json(described)


def _files_and_settings(tokenizer: Any) -> list[Any]:
    """Settings of a tokenizer written in Python, and the hashes of the files it saves (merges, models)."""
    given = getattr(tokenizer, "init_kwargs", {})
    settings = {key: str(value) for key, value in given.items() if key != "name_or_path" and not key.endswith("_file")}
    with tempfile.TemporaryDirectory() as directory:
        with suppress(AttributeError, NotImplementedError):
            tokenizer.save_vocabulary(directory)
        files = {path.name: hash_file(path) for path in Path(directory).iterdir()}
    return [sorted(settings.items()), sorted(files.items())]


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Consecutive pieces in lists of about a million characters."""
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


def encode_all(pieces: Iterable[Piece], encoder: StreamEncoder, workers: int) -> Generator[np.ndarray, None, None]:
    """Token ids of all pieces in their order, as arrays of a few hundred thousand, shape (tokens,).

    Args:
        pieces: Pieces of text, in order.
        encoder: Pieces to token ids.
        workers: Processes that tokenise; with one it is this process. At most two batches a worker are in memory.

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


_worker_encoder: StreamEncoder


def _start_worker(encoder: StreamEncoder) -> None:
    global _worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # workers are processes already; threads in each would compete
    _worker_encoder = encoder


def _encode_in_worker(batch: list[Piece]) -> np.ndarray:
    return _worker_encoder(batch)
