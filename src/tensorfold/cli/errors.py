"""Errors as the command line shows them: one line on standard error, and an exit status."""

from __future__ import annotations

from tensorfold.errors import InputError, TensorfoldError, is_out_of_memory
from tensorfold.utils.atomic_files import is_disk_full

_LONGEST = 1200  # characters of a message

# What to do with less memory, by command.
_LESS_MEMORY = {
    "fold": "fold with fewer --tokens, a lower --effort or without --calibrate, or fold fewer --targets",
    "heal": "lower --micro-batch or --block, or set precision=bf16 or gradient_checkpointing=true with --set; block by "
    "block, lower blockwise_batch, activations_mb or --blockwise-tokens",
    "eval": "take a protocol with shorter windows, such as disjoint-256",
    "bench": "lower --prefill or --tokens, give a narrower --dtype, or leave --against out",
    "export": "export --to dense, which needs least, or a smaller model",
    "sample": "lower --tokens, give a shorter --prompt, or fold the model further",
    "report": "give --no-samples, or fewer directories",
}


def can_be_put_right(error: Exception) -> bool:
    """Whether the user can remove the cause (exit status 2): the input, the command line, or a full disk."""
    if is_out_of_memory(error):
        return False
    return isinstance(error, InputError) or _usage_message(error) is not None or is_disk_full(error)


def _usage_message(error: Exception) -> str | None:
    """The message of an error of the argument parser; None for other errors.

    Such errors are known by their method, not their class: typer may carry a copy of click of its own.
    """
    message = getattr(error, "format_message", None)
    return message() if message else None


def explain(error: Exception, command: str = "") -> str:
    """The message for an error: what went wrong, and what to do about it.

    Args:
        error: The error.
        command: The command that it ended, for advice on memory.
    """
    usage = _usage_message(error)
    if usage is not None:
        context = getattr(error, "ctx", None)
        return f"{usage.rstrip('.')}; see {context.command_path if context else 'tensorfold'} --help"
    if is_out_of_memory(error):
        lower = _LESS_MEMORY.get(command, "take a smaller model")
        return f"out of memory ({type(error).__name__}: {error}); {lower}, or run it where there is more memory"
    if isinstance(error, TensorfoldError):
        return str(error)
    if is_disk_full(error):
        return f"The disk is full: {error}. Free some space, then run the command again."
    return f"unexpected {type(error).__name__}: {error}; run again with --debug and report what it prints"


def check_encoding(arguments: list[str]) -> None:
    """Raise :class:`InputError` for an argument that is not UTF-8, which no path, prompt or name can hold here."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:  # Python passes bytes that are not UTF-8 on as lone surrogates
            raise InputError(f"got {argument!r:.100} on the command line, which is not UTF-8; needed UTF-8.") from None


def line(message: str) -> str:
    """A message on one line, its middle left out where it is longer than 1200 characters.

    Lone surrogates are escaped.
    """
    words = " ".join(message.encode(errors="backslashreplace").decode().split())
    return words if len(words) <= _LONGEST else f"{words[: _LONGEST - 300]} […] {words[-200:]}"
