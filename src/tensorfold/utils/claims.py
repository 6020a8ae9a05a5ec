"""A working directory that one process at a time has to itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tensorfold.errors import TensorfoldError
from tensorfold.utils.atomic_files import make_directories
from tensorfold.utils.locks import try_lock


@contextmanager
def claimed(directory: Path, remedy: str) -> Iterator[None]:
    """Lock a working directory for this process while the context is open; it is created where it is missing.

    A directory that is empty at the end is removed.

    Args:
        remedy: End of the error's message: what to do where the directory cannot be had.

    Raises:
        TensorfoldError: Another process is at work in it, or the disk is full.
        InputError: It cannot be created.
    """
    while True:
        make_directories(directory, remedy=remedy)
        try:
            lock = try_lock(directory)
        except BlockingIOError:
            raise TensorfoldError(f"{directory} is in use by another process; wait for it, or {remedy}.") from None
        try:
            # The process that held the lock before may have removed the directory after it was found or created here.
            mine = lock is None or os.path.samestat(os.fstat(lock), os.stat(directory))
        except FileNotFoundError:
            mine = False
        if mine:
            break
        os.close(lock)  # type: ignore[arg-type]
    try:
        yield
    finally:
        with suppress(OSError):
            directory.rmdir()
        if lock is not None:
            os.close(lock)
