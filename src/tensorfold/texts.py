"""From the name of a text to its documents: files, directories, named data sets, Python's own documentation.

A named text is looked for in this order: a path on disk; ``python-docs``; ``$TENSORFOLD_DATA/NAME-SPLIT.*``, then
``$TENSORFOLD_DATA/NAME.*`` and ``$TENSORFOLD_DATA/NAME/``; the Hugging Face hub, through ``datasets``.
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tensorfold.errors import InputError

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


@dataclass(frozen=True)
class HubDataset:
    """Where a named data set lies on the Hugging Face hub.

    Args:
        path: Repository of the data set.
        config: Its configuration, or ``None`` for the only one.
        splits: Canonical names of the splits it has.
        rows_are_lines: Rows are the lines of one text, joined by a blank line as in Hugging Face's perplexity recipe.
        first: Stream the first this many rows instead of downloading everything.
    """

    path: str
    config: str | None
    splits: tuple[str, ...]
    rows_are_lines: bool = False
    first: int | None = None


_WIKITEXT_SPLITS = ("train", "validation", "test")
HUB_DATASETS = {
    "wikitext-2": HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", _WIKITEXT_SPLITS, rows_are_lines=True),
    "wikitext-103": HubDataset("Salesforce/wikitext", "wikitext-103-raw-v1", _WIKITEXT_SPLITS, rows_are_lines=True),
    # The non-raw form (``<unk>``, `` @-@ ``) that the ``krony`` protocol asks for.
    "wikitext-2-v1": HubDataset("Salesforce/wikitext", "wikitext-2-v1", _WIKITEXT_SPLITS, rows_are_lines=True),
    "wikitext-103-v1": HubDataset("Salesforce/wikitext", "wikitext-103-v1", _WIKITEXT_SPLITS, rows_are_lines=True),
    "lambada": HubDataset("EleutherAI/lambada_openai", "default", ("test",)),
    "openwebtext": HubDataset("Skylion007/openwebtext", None, ("train",), first=100_000),
    "c4": HubDataset("allenai/c4", "en", ("train", "validation"), first=100_000),
}


@dataclass(frozen=True)
class _Found:
    label: str
    read: Callable[[], list[str]]


def load_text(source: str, *, split: str = "test", min_characters: int = 1) -> list[str]:
    """Documents of a text, verbatim and in a fixed order.

    Args:
        source: A UTF-8 file (one document); a ``.jsonl`` file with a ``text`` field (one document a line); a directory
            of such files (recursive, sorted, hidden ones skipped); a name such as ``wikitext-2`` or ``python-docs``;
            or a name with its split, ``wikitext-2-test``, which then wins over ``split``.
        split: ``train``, ``validation`` (or ``valid``), ``test`` or ``calibration``; files and directories have none.
        min_characters: Documents with fewer characters, not counting outer white space, are left out.

    Raises:
        InputError: No such text, not UTF-8, not JSON, no document left, or a data set that cannot be fetched.
    """
    found = _find(source, split)
    documents = [document for document in found.read() if len(document.strip()) >= min_characters]
    if not documents:
        raise InputError(
            f"text {found.label!r} is empty: got no document of at least {min_characters} characters; "
            f"give another text, or lower min_characters"
        )
    return documents


def describe(source: str, split: str = "test") -> str:
    """Short label of a text for results, such as ``wikitext-2-test``, ``python-docs (test)`` or a file's name.

    A data set from the hub also names its repository and configuration, for it may differ from a file of that name.

    Raises:
        InputError: There is no such text.
    """
    return _find(source, split).label


def _find(source: str, split: str) -> _Found:
    if not isinstance(source, str) or not source.strip():
        raise InputError(f"text must be a file, a directory or a name, got {source!r}")
    if split not in _CANONICAL_SPLIT:
        raise InputError(f"unknown split {split!r}; needed one of {', '.join(_CANONICAL_SPLIT)}")
    if os.path.exists(source):
        label = os.path.basename(os.path.abspath(source)) + ("/" if os.path.isdir(source) else "")
        return _Found(label, partial(_read, Path(source)))

    name, split = _name_and_split(source, _CANONICAL_SPLIT[split])
    if name == _PYTHON_DOCS:
        half = "test" if split == "test" else "calibration"
        return _Found(f"{_PYTHON_DOCS} ({half})", partial(_python_docs, half))
    # A separator or a suffix makes it a path, and that path does not exist.
    if os.sep not in source:
        local = _find_local(source, name, split)
        if local is not None:
            return local
        if name in HUB_DATASETS:
            return _find_on_hub(name, split)
    raise _no_such_text(source)


def _name_and_split(source: str, split: str) -> tuple[str, str]:
    """``wikitext-2-valid`` -> (``wikitext-2``, ``validation``); a source without a split keeps the given one."""
    name, dash, ending = source.rpartition("-")
    if dash and name and ending in _CANONICAL_SPLIT:
        return name, _CANONICAL_SPLIT[ending]
    return source, split


def _find_local(source: str, name: str, split: str) -> _Found | None:
    root = _data_directory()
    if root is None:
        return None
    stems = [(f"{name}-{alias}", f"{name}-{split}") for alias in _SPLITS[split]] + [(source, source)]
    for stem, label in stems:
        path = _text_file(root, stem)
        if path is not None:
            return _Found(label, partial(_read, path))
    folder = root / source
    return _Found(source, partial(_read, folder)) if folder.is_dir() else None


def _text_file(root: Path, stem: str) -> Path | None:
    """The file ``stem.jsonl``, ``stem.txt`` or else the first ``stem.*`` in ``root``."""
    paths = [path for path in sorted(root.iterdir()) if path.stem == stem and path.suffix and path.is_file()]
    preferred = [".jsonl", ".txt"]
    return min(paths, key=lambda path: preferred.index(path.suffix) if path.suffix in preferred else 2, default=None)


def _data_directory() -> Path | None:
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


def _read(path: Path) -> list[str]:
    if not path.is_dir():
        return _read_file(path)
    inside = sorted(path.rglob("*"), key=lambda file: file.relative_to(path).parts)
    files = [
        file
        for file in inside
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    return [document for file in files for document in _read_file(file)]


def _read_file(path: Path) -> list[str]:
    try:
        # Not read_text: it would turn "\r\n" into "\n", and texts are used verbatim.
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}; "
            f"convert the file to UTF-8, or leave it out"
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; give a readable UTF-8 file") from error
    return _jsonl_documents(path, text) if path.suffix == ".jsonl" else [text]


def _jsonl_documents(path: Path, text: str) -> list[str]:
    documents = []
    # Not splitlines: JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(
                f'{path}, line {number}: not JSON ({error}); needed an object like {{"text": "..."}}'
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            got = f"an object with the keys {sorted(row)}" if isinstance(row, dict) else f"a JSON {type(row).__name__}"
            raise InputError(f'{path}, line {number}: got {got}; needed an object with a string "text"')
        documents.append(row["text"])
    return documents


def _python_docs(half: str) -> list[str]:
    """First (``calibration``) or last (``test``) half of the prose in ``pydoc_data.topics``, cut between paragraphs."""
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


def _find_on_hub(name: str, split: str) -> _Found:
    dataset = HUB_DATASETS[name]
    if split not in dataset.splits:
        raise InputError(
            f"data set {name} has no split {split!r} on the hub, only {', '.join(dataset.splits)}; "
            f"give {name}-{dataset.splits[0]}, or put {name}-{split}.txt into ${DATA_VARIABLE}"
        )
    origin = dataset.path + (f", {dataset.config}" if dataset.config else "")
    origin += f", first {dataset.first} documents" if dataset.first else ""
    return _Found(f"{name}-{split} ({origin})", partial(_read_hub, name, dataset, split))


def _read_hub(name: str, dataset: HubDataset, split: str) -> list[str]:
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
    # The hub fails with exceptions of half a dozen libraries, and all of them mean the same to the user.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(
            f"data set {name} ({dataset.path}, split {split}) could not be fetched: {type(error).__name__}: {reason}; "
            f"needed a network that reaches the Hugging Face hub; {_or_local(name, split)}"
        ) from error
    return ["\n\n".join(texts)] if dataset.rows_are_lines else texts


def _or_local(name: str, split: str) -> str:
    return f"or put the text at ${DATA_VARIABLE}/{name}-{split}.txt, or use --text {_PYTHON_DOCS}"
