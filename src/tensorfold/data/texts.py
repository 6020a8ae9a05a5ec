"""Texts by name: files, directories, named data sets, Python's own documentation.

A text is looked for in this order: a path on disk; ``python-docs``; ``$TENSORFOLD_DATA/NAME-SPLIT.*``, then
``$TENSORFOLD_DATA/NAME.*``; for wikitext a file under another of its names (see ``text_forms``);
``$TENSORFOLD_DATA/NAME/``; the Hugging Face hub, through ``datasets``.
"""

from __future__ import annotations

import codecs
import difflib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tensorfold.data.hub import HUB_DATASETS, HubDataset
from tensorfold.data.text_forms import FORMS, form_of, other_names
from tensorfold.errors import InputError, pass_on_memory

DATA_VARIABLE = "TENSORFOLD_DATA"

# Split name -> every spelling of it, the canonical one first.
_SPLITS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
    "calibration": ("calibration",),
}
_CANONICAL_SPLIT = {alias: split for split, aliases in _SPLITS.items() for alias in aliases}
_PYTHON_DOCS = "python-docs"
_CHUNK = 1 << 16  # bytes read at a time


@dataclass(frozen=True)
class Located:
    """The place of a text: local files, the hub, or, with neither, Python's own documentation.

    Attributes:
        label: Short name for results and reports.
        name: The name that the source was read as, without its split.
        split: Canonical name of the split.
        files: Local files, in a fixed order.
        dataset: Data set of the hub.
    """

    label: str
    name: str
    split: str
    files: tuple[Path, ...] | None = None
    dataset: HubDataset | None = None


def load_text(source: str, *, split: str = "test", min_characters: int = 1) -> list[str]:
    """Documents of a text, verbatim and in a fixed order.

    Args:
        source: A UTF-8 file (one document); a ``.jsonl`` file with a ``text`` field (one document a line); a directory
            of such files (recursive, sorted, hidden ones skipped); a name such as ``wikitext-2`` or ``python-docs``;
            or a name with its split, ``wikitext-2-test``, which then wins over ``split``.
        split: ``train``, ``validation`` (or ``valid``), ``test`` or ``calibration``; files and directories have none.
        min_characters: Least length of a document, outer white space not counted; shorter ones are left out.

    Raises:
        InputError: No such text, not UTF-8, not JSON, no document left, or a data set that cannot be fetched.
    """
    found = locate(source, split)
    if found.files is not None:
        every = ["".join(parts) for path in found.files for parts in file_documents(path)]
    elif found.dataset is not None:
        every = _read_hub(found.name, found.dataset, found.split)
    else:
        every = python_docs(found.split)
    documents = [document for document in every if len(document.strip()) >= min_characters]
    if not documents:
        raise InputError(
            f"text {found.label!r} is empty: got no document of at least {min_characters} characters; "
            f"give another text, or lower min_characters"
        )
    return documents


def in_form(source: str, form: str | None, split: str = "test") -> str:
    """The name of a wikitext data set in one form, where the given name leaves the form open.

    A local file of the other form still comes before the hub's data set of the right one: the name is then returned as
    it is, and :func:`form_of` tells which form was read.

    Args:
        source: Name of a text; any other than ``wikitext-2`` and ``wikitext-103`` is returned as it is.
        form: ``raw``, ``non-raw``, or ``None`` for any.
        split: Split, where the name has none.
    """
    if form is None or os.path.exists(source):
        return source
    name, split = _name_and_split(source, _CANONICAL_SPLIT.get(split, split))
    if name not in FORMS:
        return source
    exact = f"{FORMS[name][form]}-{split}"
    root = _data_directory()
    if root is None or _find_local(exact, FORMS[name][form], split) or not _find_local(source, name, split):
        return exact
    return source


def describe(source: str, split: str = "test") -> str:
    """Short name of a text for results, such as ``wikitext-2-test``, ``python-docs (test)`` or a file's name.

    For a data set of the hub it names repository and configuration too, since a local file of that name may differ.

    Raises:
        InputError: There is no such text.
    """
    return locate(source, split).label


def locate(source: str, split: str) -> Located:
    """Find a text by its name or path, without reading it.

    Raises:
        InputError: There is no such text, or no such split of it.
    """
    if not isinstance(source, str) or not source.strip():
        raise InputError(f"text must be a file, a directory or a name, got {source!r}")
    if split not in _CANONICAL_SPLIT:
        raise InputError(f"unknown split {split!r}; needed one of {', '.join(_CANONICAL_SPLIT)}")
    if os.path.exists(source):
        label = os.path.basename(os.path.abspath(source)) + ("/" if os.path.isdir(source) else "")
        return Located(label, source, split, _files_below(Path(source)))

    name, split = _name_and_split(source, _CANONICAL_SPLIT[split])
    if name == _PYTHON_DOCS:
        half = "test" if split == "test" else "calibration"
        return Located(f"{_PYTHON_DOCS} ({half})", name, half)
    # A separator or a suffix makes it a path, and that path does not exist.
    if os.sep not in source:
        local = _find_local(source, name, split)
        if local is not None:
            return local
        if name in HUB_DATASETS:
            return _find_on_hub(name, split)
    raise _no_such_text(source)


def _name_and_split(source: str, split: str) -> tuple[str, str]:
    """Name and canonical split in a source, ``wikitext-2-valid`` for one; the given split where it names none."""
    name, dash, ending = source.rpartition("-")
    if dash and name and ending in _CANONICAL_SPLIT:
        return name, _CANONICAL_SPLIT[ending]
    return source, split


def _find_local(source: str, name: str, split: str) -> Located | None:
    """The text in the directory that ``TENSORFOLD_DATA`` names; None where it is not there."""
    root = _data_directory()
    if root is None:
        return None
    stems = [(f"{name}-{alias}", f"{name}-{split}") for alias in _SPLITS[split]] + [(source, source)]
    for stem, label in stems:
        path = _text_file(root, stem)
        if path is not None:
            return Located(label, name, split, (path,))
    for other, form in other_names(name, split):
        for alias in _SPLITS[split]:
            path = _text_file(root, f"{other}-{alias}")
            if path is not None and (form is None or _form_of_file(path) == form):
                return Located(f"{name}-{split} ({path.name})", name, split, (path,))
    folder = root / source
    return Located(source, name, split, _files_below(folder)) if folder.is_dir() else None


def _form_of_file(path: Path) -> str | None:
    return form_of([part for document in file_documents(path) for part in document])


def _text_file(root: Path, stem: str) -> Path | None:
    """The file ``stem.jsonl``, ``stem.txt``, or else the first ``stem.*``, in a directory; None without any."""
    paths = [path for path in sorted(root.iterdir()) if path.stem == stem and path.suffix and path.is_file()]
    preferred = [".jsonl", ".txt"]
    return min(paths, key=lambda path: preferred.index(path.suffix) if path.suffix in preferred else 2, default=None)


def _files_below(path: Path) -> tuple[Path, ...]:
    """The file itself, or every file below a directory, in sorted order and without hidden ones."""
    if not path.is_dir():
        return (path,)
    inside = {file.relative_to(path).parts: file for file in path.rglob("*") if file.is_file()}
    return tuple(inside[parts] for parts in sorted(inside) if not any(part.startswith(".") for part in parts))


def _data_directory() -> Path | None:
    """The directory that ``TENSORFOLD_DATA`` names; None where the variable is not set."""
    value = os.environ.get(DATA_VARIABLE)
    if value is None:
        return None
    root = Path(value)
    needed = "needed a directory of texts such as wikitext-2-test.txt; correct the variable, or unset it"
    if not value or not root.is_dir():
        raise InputError(f"{DATA_VARIABLE}={value!r} is not a directory; {needed}")
    if not any(root.iterdir()):
        raise InputError(f"{DATA_VARIABLE}={value!r} is an empty directory; {needed}")
    return root


def _no_such_text(source: str) -> InputError:
    names = {*HUB_DATASETS, _PYTHON_DOCS}
    root = _data_directory()
    if root is not None:
        names |= {path.stem if path.is_file() else path.name for path in root.iterdir() if path.name[0] != "."}
    folder, typed = os.path.split(source)
    if os.access(folder or ".", os.R_OK) and os.path.isdir(folder or "."):
        names |= {os.path.join(folder, entry) for entry in os.listdir(folder or ".") if entry[0] != "."}
    shown = source if len(source) <= 80 else source[:77] + "..."
    near = difflib.get_close_matches(source[:200], sorted(names), n=3, cutoff=0.6) if typed else []
    hint = (
        f"did you mean {' or '.join(near)}?" if near else f"the named data sets are {', '.join(sorted(HUB_DATASETS))}."
    )
    return InputError(
        f"no text {shown!r}: no file, directory or data set has that name; {hint} Give a UTF-8 file, a .jsonl "
        f"file, a directory or {_PYTHON_DOCS}, or put NAME-SPLIT.txt into ${DATA_VARIABLE}"
    )


def is_jsonl(path: Path) -> bool:
    """Whether a file holds one document a line, in JSON; any other file is one document."""
    return path.suffix == ".jsonl"


def file_documents(path: Path) -> Iterator[Iterable[str]]:
    """Documents of one file, each as consecutive parts of a bounded size, without a byte-order mark.

    Raises:
        InputError: The file cannot be read, is not UTF-8, or is a ``.jsonl`` file with a line that is not JSON.
    """
    if is_jsonl(path):
        yield from ([document] for document in _jsonl_documents(path))
    else:
        yield _parts(path)


def _parts(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        # Binary, because text mode would turn "\r\n" into "\n", and texts are used verbatim.
        with path.open("rb") as file:
            read = 0
            while True:
                chunk = file.read(_CHUNK)
                waiting = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(chunk, final=not chunk)
                except UnicodeDecodeError as error:
                    raise _not_utf8(path, error, read - waiting) from error
                yield text if read else text.removeprefix("\ufeff")
                if not chunk:
                    return
                read += len(chunk)
    except OSError as error:
        pass_on_memory(error)
        raise InputError(f"{path} cannot be read: {error.strerror}; give a readable UTF-8 file") from error


def _jsonl_documents(path: Path) -> Iterator[str]:
    try:
        # Bytes, which are split at "\n" alone: str.splitlines splits at U+2028 as well, which JSON strings may hold.
        with path.open("rb") as file:
            position = 0
            for number, line in enumerate(file, start=1):
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise _not_utf8(path, error, position) from error
                position += len(line)
                text = text.removeprefix("\ufeff") if number == 1 else text
                if text.strip():
                    yield _json_document(text, f"{path}, line {number}")
    except OSError as error:
        pass_on_memory(error)
        raise InputError(f"{path} cannot be read: {error.strerror}; give a readable UTF-8 file") from error


def _not_utf8(path: Path, error: UnicodeDecodeError, before: int) -> InputError:
    return InputError(
        f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {before + error.start}; "
        f"convert the file to UTF-8, or leave it out"
    )


def _json_document(line: str, place: str) -> str:
    """The ``text`` of one line of a ``.jsonl`` file; ``place`` is named in errors."""
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f'{place}: not JSON ({error}); needed an object like {{"text": "..."}}') from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        got = f"an object with the keys {sorted(row)}" if isinstance(row, dict) else f"a JSON {type(row).__name__}"
        raise InputError(f'{place}: got {got}; needed an object with a string "text"')
    text: str = row["text"]
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place}: its text has half of a surrogate pair at character {error.start}, which is no character; write "
            "the pair whole, or leave the line out"
        ) from error
    return text


def python_docs(half: str) -> list[str]:
    """One half of the prose in ``pydoc_data.topics``, cut between paragraphs, as a list of one document.

    Args:
        half: ``calibration`` for the first half, ``test`` for the last.

    Raises:
        InputError: This Python was installed without that module.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError(
            f"{_PYTHON_DOCS}: this Python was installed without pydoc_data.topics; "
            f"install the full standard library, or give a file"
        ) from error
    text = "\n\n".join(topics[name] for name in sorted(topics))
    cut = text.index("\n\n", len(text) // 2) + 2
    return [text[cut:] if half == "test" else text[:cut]]


def _find_on_hub(name: str, split: str) -> Located:
    """The place of a named data set on the hub, which is not asked."""
    dataset = HUB_DATASETS[name]
    if split not in dataset.splits:
        raise InputError(
            f"data set {name} has no split {split!r} on the hub, only {', '.join(dataset.splits)}; "
            f"give {name}-{dataset.splits[0]}, or put {name}-{split}.txt into ${DATA_VARIABLE}"
        )
    taken = f", first {dataset.first} documents" if dataset.first else ""
    return Located(f"{name}-{split} ({dataset.origin}{taken})", name, split, dataset=dataset)


def _read_hub(name: str, dataset: HubDataset, split: str) -> list[str]:
    """The documents of a data set of the hub."""
    try:
        from datasets import load_dataset  # type: ignore[import-untyped]
    except ImportError as error:
        raise InputError(
            f"data set {name} needs the package datasets: pip install datasets; {_or_local(name, split)}"
        ) from error
    try:
        rows: Iterable[dict[str, str]] = load_dataset(
            dataset.path, dataset.config, split=split, streaming=dataset.first is not None
        )
        texts = [row["text"] for row in itertools.islice(rows, dataset.first)]
    # The hub fails with exceptions of half a dozen libraries, which all mean the same to the user.
    except Exception as error:
        pass_on_memory(error)
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(
            f"data set {name} ({dataset.path}, split {split}) could not be fetched: {type(error).__name__}: {reason}; "
            f"needed a network that reaches the Hugging Face hub; {_or_local(name, split)}"
        ) from error
    return ["\n\n".join(texts)] if dataset.rows_are_lines else texts


def _or_local(name: str, split: str) -> str:
    """Advice for a data set that cannot be read from the hub, as the end of a message."""
    return f"or put the text at ${DATA_VARIABLE}/{name}-{split}.txt, or use --text {_PYTHON_DOCS}"
