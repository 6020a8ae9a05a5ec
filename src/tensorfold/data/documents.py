"""Documents of a training text of any size, one after the other: files, directories, data sets of the hub.

Names and documents are those of :func:`tensorfold.data.texts.load_text`. Here no document is held in memory as a
whole, and a data set of the hub is streamed to its end.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from tensorfold.data import texts
from tensorfold.data.hub import HubDataset
from tensorfold.errors import InputError, TensorfoldError, pass_on_memory
from tensorfold.utils.fingerprints import hash_file, hash_json

_CHUNK = 1 << 16  # characters; small enough that a batch has work for every thread of a fast tokenizer
_MARGIN = 1 << 12  # characters before the end of a chunk that are searched for a place to cut

# Pre-tokenisers of the GPT-2 family begin a token at " word" after a word, so a cut there changes no token.
_CUT = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])")


class Piece(NamedTuple):
    """A document, or a part of one that is too long to be tokenised in one go."""

    text: str
    ends_document: bool


@dataclass(frozen=True)
class Files:
    """Local files in a fixed order: a ``.jsonl`` holds one document a line, any other file is one document.

    Attributes:
        label: Name of the text, for logs and reports.
        paths: The files.
        stamps: Size in bytes and time of the last change in nanoseconds, of each file.
    """

    label: str
    paths: tuple[Path, ...]
    stamps: tuple[tuple[int, int], ...]

    def identity(self) -> list[dict[str, Any]]:
        """Identity of the documents: the contents and the order of the files, but not their names.

        Raises:
            InputError: A file cannot be read.
        """
        return [
            {"jsonl": texts.is_jsonl(path), "bytes": path.stat().st_size, "sha256": _digest(path)}
            for path in self.paths
        ]

    def changed(self) -> bool:
        """Whether the size or the time of the last change of any file differs from when this object was made."""
        return _stamps(self.paths) != self.stamps

    def documents(self) -> Iterator[Iterable[str]]:
        """Each document as consecutive parts."""
        for path in self.paths:
            yield from texts.file_documents(path)


@dataclass(frozen=True)
class Hub:
    """A split of a data set on the Hugging Face hub.

    Attributes:
        label: Name of the text, for logs and reports.
        dataset: Its repository and configuration.
        split: Canonical name of the split.
        revision: Commit; ``None`` where the hub cannot be asked for the latest one.
    """

    label: str
    dataset: HubDataset
    split: str
    revision: str | None

    def identity(self) -> dict[str, Any]:
        """Identity of the documents: repository, configuration, split, form and commit."""
        return {
            "path": self.dataset.path,
            "config": self.dataset.config,
            "split": self.split,
            "rows_are_lines": self.dataset.rows_are_lines,
            "revision": self.revision,
        }

    def changed(self) -> bool:
        """False: a commit never changes."""
        return False

    def documents(self) -> Iterator[Iterable[str]]:
        """Each document as consecutive parts."""
        if self.dataset.rows_are_lines:
            yield (part for number, row in enumerate(self._rows()) for part in (("\n\n", row) if number else (row,)))
        else:
            yield from ([row] for row in self._rows())

    def _rows(self) -> Iterator[str]:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise InputError(f"data set {self.label} needs the package datasets: pip install datasets") from error
        try:
            rows = load_dataset(
                self.dataset.path, self.dataset.config, split=self.split, streaming=True, revision=self.revision
            )
            for row in rows:
                yield row["text"]
        # The hub fails with exceptions of half a dozen libraries, which all mean the same to the user.
        except Exception as error:
            pass_on_memory(error)
            raise TensorfoldError(
                f"data set {self.label} could not be read to its end: {type(error).__name__}: {error}; needed a "
                f"network that reaches the Hugging Face hub; run the command again, or give files"
            ) from error


@dataclass(frozen=True)
class Memory:
    """A text that is in memory already.

    Attributes:
        label: Name of the text, for logs and reports.
        held: Its documents.
    """

    label: str
    held: tuple[str, ...]

    def identity(self) -> str:
        """Identity of the documents: SHA-256 of all their characters."""
        return hash_json(self.held)

    def changed(self) -> bool:
        """False: text in memory is not written to."""
        return False

    def documents(self) -> Iterator[Iterable[str]]:
        """Each document as consecutive parts."""
        return ([document] for document in self.held)


Text: TypeAlias = Files | Hub | Memory
Source: TypeAlias = str | os.PathLike[str] | Memory | Sequence[str | os.PathLike[str] | Memory]


def find_texts(source: Source, split: str) -> list[Text]:
    """The texts that a source names, in its order.

    Args:
        source: A file, a directory or a name as :func:`tensorfold.data.texts.load_text` takes it, a text in memory, or
            a list of those.
        split: Split of a named text.

    Raises:
        InputError: The list is empty, or an entry names no text.
    """
    sources = [source] if isinstance(source, str | os.PathLike | Memory) else list(source)
    if not sources:
        raise InputError("got an empty list of texts; give at least one file, directory or data set")
    return [each if isinstance(each, Memory) else _find_text(os.fspath(each), split) for each in sources]


def iter_documents(source: Source, split: str = "train") -> Iterator[str]:
    """Documents of a text, verbatim and in a fixed order, one in memory at a time; blank ones are left out.

    Args:
        source: As :func:`find_texts` takes it.
        split: Split of a named text.

    Raises:
        InputError: No such text, not UTF-8, or not JSON.
        TensorfoldError: The hub stopped answering.
    """
    for text in find_texts(source, split):
        yield from filter(str.strip, map("".join, text.documents()))


def iter_pieces(text: Text) -> Iterator[Piece]:
    """Documents cut into pieces of about 65 thousand characters, at places where a tokenizer begins a token anyway.

    Blank documents are left out. Tokenizers without a pre-tokeniser of the GPT-2 kind, such as SentencePiece, may give
    one other token at a cut: about one in 16 thousand.

    Raises:
        InputError: A file cannot be read, is not UTF-8, or not JSON.
        TensorfoldError: The hub stopped answering.
    """
    for document in text.documents():
        rest, started = "", False
        for part in document:
            for start in range(0, len(part), _CHUNK):
                rest += part[start : start + _CHUNK]
                while len(rest) > _CHUNK + _MARGIN:
                    cut = _cut_before(rest, _CHUNK)
                    yield Piece(rest[:cut], False)
                    rest, started = rest[cut:], True
        if started or rest.strip():
            yield Piece(rest, True)


def _cut_before(text: str, end: int) -> int:
    """The last place up to ``end`` between a word and a space, or ``end`` where the text before it has none."""
    cut = end
    for match in _CUT.finditer(text, end - _MARGIN, end + 2):
        cut = match.start()
    return cut


def _find_text(source: str, split: str) -> Text:
    found = texts.locate(source, split)
    if found.files is not None:
        return Files(found.label, found.files, _stamps(found.files))
    if found.dataset is not None:
        label = f"{found.name}-{found.split} ({found.dataset.origin})"
        return Hub(label, found.dataset, found.split, _revision(found.dataset.path))
    return Memory(found.label, tuple(texts.python_docs(found.split)))


def _stamps(paths: tuple[Path, ...]) -> tuple[tuple[int, int], ...]:
    """Size in bytes and time of the last change in nanoseconds, of each file."""
    return tuple((status.st_size, status.st_mtime_ns) for status in map(os.stat, paths))


def _revision(repository: str) -> str | None:
    """The latest commit of a data set on the hub; ``None`` where the hub does not answer."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(repository).sha
    except Exception as error:  # of many kinds; a token cache made earlier may still serve
        pass_on_memory(error)
        return None


def _digest(path: Path) -> str:
    try:
        return hash_file(path)
    except OSError as error:
        pass_on_memory(error)
        raise InputError(f"{path} cannot be read: {error.strerror}; give a readable UTF-8 file") from error
