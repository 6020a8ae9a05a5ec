"""The files beside a model's weights: its card, evaluations, the log of healing, timings."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorfold.errors import InputError, TensorfoldError, pass_on_memory
from tensorfold.utils.atomic_files import check_path, is_disk_full

CARD = "tensorfold.json"
EVALUATIONS = "tensorfold-evaluations.jsonl"
HEAL_LOG = "heal.jsonl"
BENCH = "tensorfold-bench.json"


def check_recordable(directory: str | Path) -> Path:
    """Check that evaluations can be recorded in a directory, before a long computation; return it as a path.

    Raises:
        InputError: It is no model's directory, or cannot be written.
    """
    check_path(directory)
    path = Path(directory)
    if not (path / "config.json").is_file():
        raise InputError(f"{directory}: not a model's directory; needed one with a config.json to record in.")
    file = path / EVALUATIONS
    if file.exists() and not file.is_file():
        raise InputError(f"{file} is not a file; remove it.")
    if not os.access(file if file.exists() else path, os.W_OK):
        raise InputError(f"{file} cannot be written; give the directory write permission, or leave the recording out.")
    return path


def record_evaluation(directory: str | Path, result: Mapping[str, Any]) -> None:
    """Append one evaluation to the file :data:`EVALUATIONS` of a model's directory.

    Each record is one line and one write, so that records of several processes do not mix. Where a full disk cut a line
    short, the next record begins a new one, and readers pass the torn line over.

    Args:
        directory: The model's directory.
        result: JSON values of the evaluation, by name.

    Raises:
        InputError: It is no model's directory, or cannot be written.
        TensorfoldError: The disk is full.
    """
    file = check_recordable(directory) / EVALUATIONS
    line = (json.dumps(dict(result)) + "\n").encode()
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode) and status.st_size:
                os.lseek(descriptor, -1, os.SEEK_END)
                if os.read(descriptor, 1) != b"\n":
                    line = b"\n" + line
            if os.write(descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        pass_on_memory(error)
        if is_disk_full(error):
            raise TensorfoldError(f"The disk is full: nothing was recorded in {file}. Free some space.") from error
        raise InputError(f"{file} cannot be written ({error.strerror}).") from error


def read_object(file: Path) -> dict[str, Any] | None:
    """Read a JSON object from a file; None where there is no file.

    Raises:
        InputError: The file cannot be read, or holds something else.
    """
    text = _read(file)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{file.name} is not valid JSON") from None
    if not isinstance(value, dict):
        raise InputError(f"{file.name} holds no JSON object")
    return value


def read_card(directory: Path) -> dict[str, Any]:
    """The card in a model's directory, ``tensorfold.json``; empty where there is none that can be read."""
    try:
        return read_object(directory / CARD) or {}
    except (InputError, OSError, ValueError) as error:  # ValueError for a path with a null character
        pass_on_memory(error)
        return {}


def read_lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """Read JSON objects from a file, one a line; none where there is no file.

    Returns:
        The objects, and how many lines that are not blank hold something else.

    Raises:
        InputError: The file cannot be read.
    """
    objects, others = [], 0
    for line in (_read(file) or "").split("\n"):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            objects.append(value)
        else:
            others += 1
    return objects, others


def _read(file: Path) -> str | None:
    """A file's text; None where there is no file."""
    if not file.exists():
        return None
    if not file.is_file():
        raise InputError(f"{file.name} is not a file")
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        pass_on_memory(error)
        raise InputError(f"{file.name} cannot be read ({error.strerror})") from None
