"""Locks on files and directories that the kernel drops with the process that holds them."""

from __future__ import annotations

import os
from pathlib import Path

from tensorfold.errors import pass_on_memory


def try_lock(path: Path) -> int | None:
    """Lock a directory or file and return the descriptor that holds the lock; None where it cannot be locked.

    Raises:
        BlockingIOError: Another process holds the lock.
    """
    from filelock import lock_descriptor

    descriptor = None
    try:
        descriptor = os.open(path, os.O_RDONLY)
        free = lock_descriptor(descriptor, blocking=False)
    except OSError as error:
        if descriptor is not None:
            os.close(descriptor)
        pass_on_memory(error)
        return None
    if not free:
        os.close(descriptor)
        raise BlockingIOError(f"{path} is locked by another process")
    return descriptor
