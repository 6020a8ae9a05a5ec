"""Memory handed back to the operating system before the process ends."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
from contextlib import suppress

from torch import Tensor

_PAGE = mmap.PAGESIZE
_MADV_DONTNEED = 4
_MADV_PAGEOUT = 21
_M_MMAP_THRESHOLD = -3


def release_file_pages(tensor: Tensor) -> None:
    """Let the system drop the pages of a tensor that is mapped from a file and no longer needed.

    safetensors maps a checkpoint as one piece, so the pages of a replaced weight would stay resident as long as any
    other weight of the file lives. Nothing is lost: whoever still uses the tensor reads it from the file again. Tensors
    in other memory are left alone, and on other systems than Linux nothing happens.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or not _is_file_mapped(tensor.data_ptr()):
        return
    _advise(tensor, _MADV_PAGEOUT)


def drop_file_pages(tensor: Tensor) -> None:
    """Take the pages of a tensor that is mapped from a file out of this process; the system may keep them cached.

    Faster than :func:`release_file_pages` where the tensor is used again soon, but what has been written to a private
    mapping is lost: the tensor has the file's values again. Pages that it shares with its neighbours stay.
    """
    if sys.platform == "linux":
        _advise(tensor, _MADV_DONTNEED)


def is_file_mapped(tensor: Tensor) -> bool:
    """Whether a tensor on the CPU lies in memory that is mapped from a file; always false without /proc."""
    return tensor.device.type == "cpu" and _is_file_mapped(tensor.data_ptr())


def _advise(tensor: Tensor, advice: int) -> None:
    """Advise the system on the whole pages of a contiguous stretch of memory that belong to a tensor alone."""
    start = -(-tensor.data_ptr() // _PAGE) * _PAGE
    length = (tensor.data_ptr() + tensor.numel() * tensor.element_size() - start) // _PAGE * _PAGE
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)


def return_large_blocks() -> None:
    """Let the C library hand back every freed block of a megabyte or more at once, from now on.

    By default the size from which it does so rises to 32 MB with the first such block that is freed, and matrices below
    it leave a heap with holes: twice the memory that is in use was measured. Without glibc nothing happens.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


def memory_bytes() -> float:
    """Bytes of memory that the machine has; infinite where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return math.inf


def release_heap() -> None:
    """Let the C library hand back freed memory; it keeps hundreds of megabytes after a backward pass.

    Without glibc nothing happens.
    """
    with suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _is_file_mapped(address: int) -> bool:
    """Whether an address lies in memory mapped from a file, by the lines ``start-end … path`` of /proc/self/maps."""
    with suppress(OSError), open("/proc/self/maps") as maps:
        for line in maps:
            fields = line.split(maxsplit=5)
            start, _, end = fields[0].partition("-")
            if int(start, 16) <= address < int(end, 16):
                return len(fields) == 6 and fields[5].startswith("/")
    return False
