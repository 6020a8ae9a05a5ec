"""Training text, tokenised once into a memory-mapped file and cut into windows.

The file is one flat stream of token ids, ``document eos document eos …``. Every window begins with the p tokens that
the tokenizer puts before a document, which are not in the stream: window i of w tokens is those p and
``stream[i·(w−p) : (i+1)·(w−p)]``, so one cache serves windows of every size. Text and tokens are streamed: no more than
a few megabytes of them are in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from tensorfold.data.documents import Files, Hub, Source, Text, find_texts, iter_pieces
from tensorfold.data.encode import StreamEncoder, encode_all, tokenizer_fingerprint
from tensorfold.data.tokens import prefix_of
from tensorfold.data.windows import TokenWindows
from tensorfold.errors import InputError, TensorfoldError, pass_on_memory
from tensorfold.utils.atomic_files import atomic_directory, cache_directory
from tensorfold.utils.fingerprints import hash_file, hash_json

_FORMAT = 2  # part of a cache's key
_STRETCHES = 64  # most that validation windows are spread over
_TOKENS, _SIDECAR = "tokens.bin", "cache.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenCache:
    """A tokenised text on disk, cut into windows for training and validation.

    Args:
        path: Directory with ``tokens.bin`` and its sidecar ``cache.json``.
        key: Identity of text and tokenizer; equal keys mean equal tokens and an equal prefix.
        label: The text's name, for logs and reports.
        tokens: Length of the whole stream.
        dtype: Dtype of the stored ids: ``uint16``, or ``uint32`` for vocabularies that need it.
        window_size: Tokens of a window, the prefix included.
        validation_fraction: Share of the windows that is not trained on; at least one window where there are two. 0
            keeps none.
        stretches: How many equal stretches of the text the windows for validation end, so that those of a directory of
            many kinds of text are of many kinds.
        prefix: Token ids that every window begins with: what the tokenizer puts before a document.
        largest: Largest token id in the stream and the prefix.

    Raises:
        InputError: The text is too short for one window, or a number is out of range.
    """

    path: Path
    key: str
    label: str
    tokens: int
    dtype: str
    window_size: int
    validation_fraction: float = 0.01
    stretches: int = 1
    prefix: tuple[int, ...] = ()
    largest: int = 0

    def __post_init__(self) -> None:
        _check_windows(self.window_size, self.validation_fraction, len(self.prefix))
        if self.tokens < self._text_size:
            raise InputError(
                f"text {self.label!r} has {self.tokens} tokens, and one window needs {self._text_size}; "
                f"give more text, or a block of at most {self.tokens + len(self.prefix)} tokens"
            )

    @property
    def _text_size(self) -> int:
        """Tokens of the stream in one window."""
        return self.window_size - len(self.prefix)

    @property
    def windows(self) -> int:
        """Number of whole windows in the stream; the rest, shorter than one window, is left out."""
        return self.tokens // self._text_size

    @property
    def train(self) -> TokenWindows:
        """The windows to train on, one behind the other: all but those for validation."""
        size = self._text_size
        return self._view([(first * size, count) for first, count, _ in self._divided()], size)

    @property
    def train_anywhere(self) -> TokenWindows:
        """Overlapping windows of the text to train on, one from each of its tokens on."""
        size = self._text_size
        return self._view([(first * size, (count - 1) * size + 1) for first, count, _ in self._divided() if count], 1)

    @property
    def validation(self) -> TokenWindows:
        """The windows for validation: ``validation_fraction`` of all, the last ones of every stretch."""
        size = self._text_size
        return self._view([((first + count) * size, held) for first, count, held in self._divided()], size)

    def _divided(self) -> list[tuple[int, int, int]]:
        """Of every stretch its first window, how many are trained on, and how many behind those are for validation."""
        held = max(1, int(self.windows * self.validation_fraction))
        if not self.validation_fraction or self.windows < 2:
            held = 0
        rows = max(1, min(self.stretches, held, self.windows - held))  # each has one of either kind at least
        ends = [self.windows * row // rows for row in range(rows + 1)]
        shares = [held * row // rows for row in range(rows + 1)]
        counts = [
            (after - before, to - since)
            for (before, after), (since, to) in zip(pairwise(ends), pairwise(shares), strict=True)
        ]
        return [(first, count - share, share) for first, (count, share) in zip(ends, counts, strict=False)]

    def _view(self, parts: list[tuple[int, int]], stride: int) -> TokenWindows:
        return TokenWindows(self.path / _TOKENS, self.dtype, self.window_size, parts, stride, self.prefix)

    @classmethod
    def build(
        cls,
        source: Source,
        tokenizer: Any,
        window_size: int,
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
            tokenizer: A transformers tokenizer. Documents end with its EOS token, or with a blank line where it has
                none. Every window begins with what it puts before a document by default.
            window_size: Tokens of a window, that beginning included; not part of the cache's identity.
            split: Split of a named text.
            cache_dir: Directory for the caches; ``cache_directory("tokens")`` by default.
            validation_fraction: Share of the windows that is not trained on.
            workers: Processes that tokenise. The tokens do not depend on their number.
            max_tokens: Most tokens to store, for texts too large to store whole.
            expect_key: Key that a resumed run was started with.

        Raises:
            InputError: No such text, one too short for a window, or ``expect_key`` is not the key of this text.
            TensorfoldError: The disk is full, a file changed while it was read, or a worker died.
        """
        prefix = prefix_of(tokenizer)
        _check_windows(window_size, validation_fraction, len(prefix))
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
            _store(path, texts, StreamEncoder.of(tokenizer), identity, workers, replace=damaged)
            sidecar = _checked_sidecar(path)
        return cls._of(path, sidecar | {"label": label}, window_size, validation_fraction)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        expect_key: str | None = None,
        window_size: int = 1024,
        validation_fraction: float = 0.01,
    ) -> Self:
        """Open a cache by its directory, and check it against its sidecar.

        Args:
            path: Directory with ``tokens.bin`` and ``cache.json``.
            expect_key: Key that a resumed run was started with.
            window_size: Tokens of a window.
            validation_fraction: Share of the windows that is not trained on.

        Raises:
            InputError: There is no cache, a damaged one, or one with another key.
        """
        sidecar = _checked_sidecar(Path(path))
        _check_key(sidecar["key"], expect_key, sidecar["label"])
        return cls._of(Path(path), sidecar, window_size, validation_fraction)

    @classmethod
    def _of(cls, path: Path, sidecar: dict[str, Any], window_size: int, validation_fraction: float) -> Self:
        own = {name: sidecar[name] for name in ("key", "label", "tokens", "dtype", "stretches", "prefix", "largest")}
        return cls(path, window_size=window_size, validation_fraction=validation_fraction, **own)


def _checked_sidecar(path: Path) -> dict[str, Any]:
    """The fields of a cache that its sidecar holds, once length and SHA-256 of the tokens are found to be right.

    Raises:
        InputError: There is no cache, or a damaged one.
    """
    try:
        sidecar = json.loads((path / _SIDECAR).read_text(encoding="utf-8"))
        size = sidecar["tokens"] * np.dtype(sidecar["dtype"]).itemsize
        found = (path / _TOKENS).stat().st_size
        if found != size:
            raise ValueError(f"{_TOKENS} has {found} bytes instead of {size}")
        # Hashing all tokens takes no longer than hashing the text, which finding the cache did already.
        if hash_file(path / _TOKENS) != sidecar["sha256"]:
            raise ValueError(f"the checksum of {_TOKENS} differs")
        prefix = tuple(sidecar["identity"].get("prefix", ()))
        return {
            **{name: sidecar[name] for name in ("key", "label", "tokens", "dtype")},
            "stretches": max(1, min(_STRETCHES, len(sidecar["files"]))),
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
    path: Path, texts: list[Text], encoder: StreamEncoder, identity: dict[str, Any], workers: int, *, replace: bool
) -> None:
    """Write a cache, whole or not at all: the tokens of all texts, and the sidecar.

    Raises:
        InputError: The texts are empty.
        TensorfoldError: The disk is full, a file changed while it was read, or a worker died.
    """
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
    path: Path, texts: list[Text], encoder: StreamEncoder, workers: int, max_tokens: int | None
) -> dict[str, int | str]:
    """Write the token ids of all texts to a file.

    Returns:
        ``tokens``, their number; ``largest``, the largest id; ``sha256`` of the file.
    """
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
    return hash_json(identity)[:32]


def _label(texts: list[Text]) -> str:
    return " + ".join(text.label for text in texts)


def _latest_known(directory: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Identity of the newest cache of the same data set of the hub at any revision: what there is without network.

    None where no cache differs in the revision alone.
    """
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
    """The identity of a cache without the commits of its data sets."""
    texts = [text | {"revision": None} if isinstance(text, dict) else text for text in identity.get("texts", ())]
    return identity | {"texts": texts}


def _check_windows(window_size: int, validation_fraction: float, prefix: int) -> None:
    if window_size < max(2, prefix + 1):
        raise InputError(
            f"got window_size={window_size}; a window needs at least {max(2, prefix + 1)} tokens, so that one is "
            f"predicted from another{f'; {prefix} of them stand before every document' if prefix else ''}"
        )
    if not 0 <= validation_fraction < 1:
        raise InputError(f"got validation_fraction={validation_fraction}; needed at least 0 and less than 1")


def _check_key(key: str, expected: str | None, label: str) -> None:
    if expected is not None and key != expected:
        raise InputError(
            f"the text or its tokenizer changed: text {label!r} now has the key {key}, and the run to resume was "
            f"started with {expected}; bring back the older text, or start a new run in another directory"
        )
