"""Memory for activations: in RAM up to a limit, in memory-mapped files beyond it."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from tensorfold.errors import TensorfoldError
from tensorfold.utils.atomic_files import cache_directory, is_disk_full
from tensorfold.utils.memory import drop_file_pages

log = logging.getLogger(__name__)


class ActivationStore:
    """An allocator of tensors on the CPU, in RAM up to a limit and in memory-mapped files beyond it.

    A mapped tensor is read and written like any other; the operating system keeps as much of it in RAM as is free. Its
    file is gone with the last tensor that uses it, or with the process, however that ends.

    Args:
        limit_mb: Megabytes (10⁶ bytes) of RAM for all tensors together.
        directory: Directory for the files; the cache directory for activations by default.
    """

    def __init__(self, limit_mb: int, directory: Path | None = None) -> None:
        self._free = limit_mb * 10**6
        self._directory = directory
        self._mapped_at: set[int] = set()  # addresses

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Allocate a tensor with undefined values.

        Raises:
            TensorfoldError: The disk has no room for it.
        """
        size = math.prod(shape) * dtype.itemsize
        if size <= self._free:
            self._free -= size
            return torch.empty(shape, dtype=dtype)
        return self._mapped(shape, dtype, size)

    def let_go(self, tensor: Tensor) -> None:
        """Take a tensor that this store mapped out of the process's memory; its values stay in the file."""
        if tensor.data_ptr() in self._mapped_at:
            drop_file_pages(tensor)

    def _mapped(self, shape: tuple[int, ...], dtype: torch.dtype, size: int) -> Tensor:
        directory = cache_directory("activations") if self._directory is None else self._directory
        handle, name = tempfile.mkstemp(suffix=".activations", dir=directory)
        try:
            try:
                _reserve(handle, size)
            finally:
                os.close(handle)
            tensor = torch.from_file(name, shared=True, size=math.prod(shape), dtype=dtype).reshape(shape)
        except OSError as error:
            if is_disk_full(error):
                raise TensorfoldError(
                    f"The disk is full: activations need {size / 1e6:.0f} MB at {directory}. Free some space, set "
                    "TENSORFOLD_CACHE to a larger disk, or take fewer tokens."
                ) from error
            raise
        finally:
            os.unlink(name)  # the mapping keeps the contents
        self._mapped_at.add(tensor.data_ptr())
        log.info("activations of %.0f MB are kept in a file at %s", size / 1e6, directory)
        return tensor


def let_go(allocate: object, tensor: Tensor) -> None:
    """Take a tensor out of memory where an :class:`ActivationStore` made it; others stay."""
    if isinstance(allocate, ActivationStore):
        allocate.let_go(tensor)


def _reserve(handle: int, size: int) -> None:
    """Reserve disk space for a file: writing to a mapped file on a full disk would kill the process by a signal."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.truncate(handle, size)
