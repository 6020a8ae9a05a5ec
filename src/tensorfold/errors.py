"""The exceptions this package raises on purpose.

Every message says what was got, what was needed and what to do about it. The command line turns
:class:`InputError` and a full disk into exit status 2, and any other :class:`TensorfoldError` into exit status 1.
A want of memory is passed on as it is, and ends with 1 too.
"""

import errno
import os


class TensorfoldError(Exception):
    """Something went wrong while working; the input was acceptable (exit status 1)."""


class InputError(TensorfoldError, ValueError):
    """The caller's input cannot be used: a bad option, recipe, model, text or checkpoint (exit status 2)."""


class SpecError(InputError):
    """A shape, bond or budget that no matrix product operator can have."""


_NO_MEMORY = (  # what libraries say without a type of their own: torch on processors, CUDA's libraries, C++, Rust, mmap
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "bad allocation",
    "bad_alloc",
    "ALLOC_FAILED",
    os.strerror(errno.ENOMEM),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error``, or what it was raised from, is a want of memory: of the machine's, or of an accelerator's."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if _is_want_of_memory(current):
            return True
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return False


def _is_want_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # By name, since torch is not imported for an error's sake.
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return not isinstance(error, TensorfoldError) and any(words in str(error) for words in _NO_MEMORY)


def pass_on_memory(error: BaseException) -> None:
    """Raise ``error`` again if memory ran out: for handlers that take every other error for a fault of the input."""
    if is_out_of_memory(error):
        raise error


def reason(error: BaseException) -> str:
    """One line that says why: the message's first, with the next where the first only announces it."""
    message = f"no key {error}" if isinstance(error, KeyError) else str(error)
    lines = [line.strip() for line in message.splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:300]
