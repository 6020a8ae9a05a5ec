"""The cache directory, and files and directories that are written whole or not at all."""

from __future__ import annotations

import errno
import itertools
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tensorfold.errors import InputError, TensorfoldError, pass_on_memory
from tensorfold.utils.locks import try_lock

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_FOR_TORCH = "unexpected pos"  # torch.save's words for a write that was cut short, and for nothing else
_DISPLACED = "old-"  # in the name of a directory that is being replaced
_LONGEST_NAME = 200  # bytes; file systems take 255, and temporary files have longer names
_DEEPEST = 200  # folders


def cache_directory(kind: str) -> Path:
    """Directory for cached files of one ``kind`` (``"tokens"``, …), created when missing.

    ``$TENSORFOLD_CACHE/kind``, else ``$XDG_CACHE_HOME/tensorfold/kind``, else ``~/.cache/tensorfold/kind``, on macOS
    too: the places of the XDG base directory specification.

    Raises:
        InputError: The directory cannot be created.
    """
    if root := os.environ.get("TENSORFOLD_CACHE"):
        base = Path(root).expanduser()
    else:
        from platformdirs.unix import Unix

        base = Unix("tensorfold").user_cache_path.expanduser()
    directory = base / kind
    make_directories(directory, remedy="set TENSORFOLD_CACHE to a directory that can be written")
    return directory


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or any error that caused it or was being handled, comes from a full disk or quota.

    Writers in Rust (safetensors, tokenizers) raise exceptions of their own that hold only the system's words for it.
    """
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, OSError) and current.errno in _FULL:
            return True
        if any(words in str(current) for words in (_FULL_FOR_TORCH, *map(os.strerror, _FULL))):
            return True
        current = current.__cause__ or current.__context__
    return False


@contextmanager
def atomic_directory(
    target: str | os.PathLike[str], *, replace: bool = False, keep_existing: bool = False
) -> Iterator[Path]:
    """Yield a temporary sibling of ``target`` that becomes ``target`` when the block ends without an error.

    The sibling is named ``.NAME.RANDOM.partial``. An error removes it and leaves ``target`` as it was; what a killed
    process left behind is removed by the next call for the same target. Files are flushed to disk before the rename.

    Args:
        target: Directory to write; missing parents are created, a symbolic link is followed.
        replace: Put the new directory in the place of an existing one.
        keep_existing: Leave a directory that is there, or that another process finishes first, and drop the new one.

    Raises:
        InputError: ``target`` is a file, or a directory with something in it and neither option is given, or cannot
            be created.
        TensorfoldError: The disk is full.
    """
    if replace and keep_existing:
        raise InputError("atomic_directory: replace and keep_existing exclude each other; give one of them.")
    check_place(Path(target))
    target = Path(target).resolve()
    if not target.name:
        raise InputError(f"{target} is the root directory; name a directory below it.")
    make_directories(target.parent, remedy="name a directory that can be created")
    _clear_leftovers(target)
    check_target(target, may_exist=replace or keep_existing)
    with _temporary(target, Path.mkdir) as temporary:
        yield temporary
        _flush(temporary)
        _move_into_place(temporary, target, replace, keep_existing)


@contextmanager
def atomic_file(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary sibling of ``target`` that takes its place when the block ends without an error.

    Missing parents are created, and a file that is there is replaced.

    Raises:
        InputError: ``target`` is something else than a regular file, or cannot be written.
        TensorfoldError: The disk is full.
    """
    check_place(Path(target))
    target = Path(target).resolve()
    check_file_target(target)
    make_directories(target.parent, remedy="name a file in a directory that can be created")
    _clear_leftovers(target)
    with _temporary(target, lambda path: path.touch(exist_ok=False)) as temporary:
        yield temporary
        _flush_entry(temporary, required=True)
        os.replace(temporary, target)
    _flush_entry(target.parent)


def write_file(target: str | os.PathLike[str], content: bytes) -> None:
    """Write a file whole or not at all; errors and what may be there already as for :func:`atomic_file`."""
    with atomic_file(target) as temporary:
        temporary.write_bytes(content)


def check_file_target(target: Path) -> None:
    """Check before a long computation that :func:`write_file` can write there; raise its :class:`InputError` if not."""
    check_place(target)
    if target.is_dir():
        raise InputError(f"{target} is a directory, and a file is to be written there; name a file.")
    if target.exists() and not target.is_file():
        raise InputError(f"{target} is neither a file nor free; choose another name.")


@contextmanager
def _temporary(target: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """Yield a locked sibling of ``target``, and remove what is left of it at the end.

    Raises:
        TensorfoldError: The disk became full meanwhile.
    """
    temporary, lock = _make_temporary(target, make)
    try:
        yield temporary
    except Exception as error:
        if is_disk_full(error):
            raise TensorfoldError(
                f"The disk is full ({shutil.disk_usage(target.parent).free / 1e6:.0f} MB left at {target.parent}): "
                f"{target} was not written. Free some space or choose another place, then run the command again."
            ) from error
        raise
    finally:
        _remove(temporary)
        if lock is not None:
            os.close(lock)


def _remove(path: Path) -> None:
    """Remove a directory with all in it, or a file, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def make_directories(directory: Path, *, remedy: str) -> None:
    """Create a directory and its missing parents, or none of them.

    Args:
        remedy: End of the error's message: what to do where the directory cannot be created.

    Raises:
        InputError: It cannot be created.
        TensorfoldError: The disk is full.
    """
    made = [directory, *directory.parents]
    made = list(itertools.takewhile(lambda folder: not os.path.lexists(folder), made))
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        pass_on_memory(error)
        for folder in made:  # those of its parents that could be made
            with suppress(OSError):
                folder.rmdir()
        if is_disk_full(error):
            raise TensorfoldError(f"The disk is full: {directory} was not created. Free some space.") from error
        raise InputError(f"{directory} cannot be created ({error.strerror}); {remedy}.") from error


def _is_occupied(target: Path) -> bool:
    return target.is_dir() and any(target.iterdir())


def check_target(target: Path, may_exist: bool = False) -> None:
    """Check before a long computation that :func:`atomic_directory` can write there; raise its error if not.

    A directory that is not empty is allowed if ``may_exist``.
    """
    check_place(target)
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file, and a directory is to be written there; choose another name.")
    if _is_occupied(target) and not may_exist:
        raise InputError(f"{target} already exists and is not empty; choose another name or remove it first.")


def check_path(path: str | os.PathLike[str]) -> None:
    """Raise :class:`InputError` for a path that is not UTF-8, or that the system refuses to look up."""
    try:
        os.fspath(path).encode()
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        pass_on_memory(error)
        shown = str(path)[:200].encode(errors="backslashreplace").decode()
        raise InputError(f"{shown}: no usable path ({_cause(error)}); choose another name.") from error


def check_place(target: Path) -> None:
    """Raise :class:`InputError` for a path that cannot be written to, whatever is there now."""
    check_path(target)
    shown = str(target)[:200]
    try:
        place = target.resolve()
        above = next(folder for folder in (*place.parents, place) if folder.exists())
    except (OSError, RuntimeError) as error:  # a path that is too long, or links in a circle
        pass_on_memory(error)
        raise InputError(f"{shown} cannot be written ({_cause(error)}); choose another name.") from error
    longest = len(os.fsencode(place.name))
    if longest > _LONGEST_NAME or len(place.parts) > _DEEPEST:
        raise InputError(
            f"{shown}: a name of {longest} bytes, {len(place.parts)} folders deep; needed at most {_LONGEST_NAME} "
            f"bytes, since temporary files beside it have longer names, and {_DEEPEST} folders."
        )
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InputError(
            f"{shown} cannot be written: {above} is not a directory with write permission; choose another place."
        )


def _cause(error: Exception) -> str:
    """The system's words for an error, else the error's own."""
    return (getattr(error, "strerror", None) or str(error))[:100]


def _make_temporary(target: Path, make: Callable[[Path], None]) -> tuple[Path, int | None]:
    """Create and lock a sibling of ``target``; return its path and the descriptor that holds the lock.

    The kernel drops the lock when the process ends, however it ends, so a sibling without a lock is a leftover.
    """
    while True:
        temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
        try:
            make(temporary)
        except FileExistsError:
            continue
        except OSError as error:
            pass_on_memory(error)
            if is_disk_full(error):
                raise TensorfoldError(f"The disk is full: {target} was not written. Free some space.") from error
            raise InputError(
                f"{target} cannot be written ({error.strerror}); name a directory that can be written."
            ) from error
        try:
            lock = try_lock(temporary)
        except BlockingIOError:  # another process is clearing it away as stale
            continue
        if temporary.exists():
            return temporary, lock
        if lock is not None:
            os.close(lock)


def _clear_leftovers(target: Path) -> None:
    """Remove what killed processes left beside ``target``.

    Where one was killed between the two renames that replace ``target``, the old directory is put back.
    """
    for left in _siblings(target):
        try:
            lock = try_lock(left)
        except BlockingIOError:
            continue
        if left.name.startswith(f".{target.name}.{_DISPLACED}") and not target.exists():
            left.rename(target)
        elif lock is not None:
            _remove(left)
        if lock is not None:
            os.close(lock)


def _siblings(target: Path) -> list[Path]:
    """The temporary files and directories beside ``target`` that are named after it."""
    # The last part has no dot, which keeps the siblings of "model.v2" out of those of "model".
    ours = re.compile(rf"\.{re.escape(target.name)}\.[^.]+\.partial")
    return [Path(entry.path) for entry in os.scandir(target.parent) if ours.fullmatch(entry.name)]


def _move_into_place(temporary: Path, target: Path, replace: bool, keep_existing: bool) -> None:
    """Rename a finished directory to ``target``.

    Raises:
        InputError: Another process has written ``target`` meanwhile, and neither option is given.
        TensorfoldError: Another process is replacing ``target``.
    """
    if replace and _is_occupied(target):
        _swap(temporary, target)
    else:
        try:
            temporary.rename(target)
        except OSError as error:
            pass_on_memory(error)
            if not _is_occupied(target):
                raise
            if not keep_existing:
                raise InputError(
                    f"{target} was written by another process in the meantime and was left as it is; "
                    "choose another name."
                ) from error
    _flush_entry(target.parent)


def _swap(temporary: Path, target: Path) -> None:
    """Replace a directory by two renames.

    The old one is locked while it lies aside, so that no other process takes it for the leftover of a killed one.
    """
    displaced = target.parent / f".{target.name}.{_DISPLACED}{secrets.token_hex(4)}.partial"
    try:
        lock = try_lock(target)
    except BlockingIOError as error:
        raise TensorfoldError(
            f"{target} is being replaced by another process and was left to it; run one command at a time."
        ) from error
    try:
        target.rename(displaced)
        try:
            temporary.rename(target)
        except OSError:
            displaced.rename(target)
            raise
        shutil.rmtree(displaced, ignore_errors=True)
    finally:
        if lock is not None:
            os.close(lock)


def _flush(directory: Path) -> None:
    """Write everything below ``directory`` through to the disk, so that the rename never outruns the contents."""
    for root, _, names in os.walk(directory):
        for name in names:
            _flush_entry(Path(root) / name, required=True)
        _flush_entry(Path(root))


def _flush_entry(path: Path, required: bool = False) -> None:
    """Write a file, or the list of a directory's files, through to the disk.

    Raises:
        OSError: The disk is full or failing, and ``required`` is given.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Some file systems cannot flush directories or special files; a failure to store data is never passed over.
        if required and error.errno in (*_FULL, errno.EIO):
            raise
