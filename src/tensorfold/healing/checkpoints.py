"""Checkpoints of healing that are whole or absent, and whose damage is found before they are used.

A run's working directory holds ``run.json`` (the run's identity), ``log.jsonl``, and directories with a
``manifest.json`` of the SHA-256 of every file in them: ``start`` (the weights before healing), ``blocks`` (the weights
after block-by-block healing, whose single blocks are in ``blockwise``) and ``checkpoint-STEP``.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from tensorfold.errors import InputError, TensorfoldError, pass_on_memory
from tensorfold.utils.atomic_files import atomic_directory, make_directories, write_file
from tensorfold.utils.fingerprints import hash_file, hash_json, hash_model

log = logging.getLogger(__name__)

MANIFEST, RUN, STATE = "manifest.json", "run.json", "trainer_state.json"
_KEPT = 2  # checkpoints


@contextmanager
def sealed(target: Path) -> Iterator[Path]:
    """Yield a directory that becomes ``target``, with a manifest, when the ``with`` block ends without an error.

    Raises:
        TensorfoldError: It could not be written; an earlier ``target`` is left as it was.
    """
    try:
        with atomic_directory(target, replace=True) as partial:
            yield partial
            manifest = {str(path.relative_to(partial)): hash_file(path) for path in _files(partial)}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    # torch and safetensors report a failed write in exceptions of their own.
    except (OSError, RuntimeError, SafetensorError) as error:
        pass_on_memory(error)
        free = shutil.disk_usage(target.parent).free / 1e6
        raise TensorfoldError(
            f"{target}: could not be written ({' '.join(str(error).split())[:200]}; {free:.0f} MB are free); earlier "
            "checkpoints are intact. Make room, then run the same command again."
        ) from error


def damage(directory: Path) -> str | None:
    """The reason why a directory with a manifest cannot be used, in words; None where it is intact."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        for name, digest in manifest.items():
            if hash_file(directory / name) != digest:
                return f"the checksum of {name} differs"
    except (OSError, ValueError, AttributeError) as error:
        pass_on_memory(error)
        return " ".join(str(error).split())
    return None


def newest(work: Path) -> Path | None:
    """The intact checkpoint with the most steps, None without any; damaged ones are passed over with a warning."""
    for path in reversed(_checkpoints(work)):
        reason = damage(path)
        if reason is None:
            return path
        log.warning("%s is damaged (%s); going on from the checkpoint before it", path, reason)
    return None


def rotate(work: Path, step: int) -> None:
    """Remove all checkpoints but the last two up to ``step``, and the best by validation that each of them refers to.

    Checkpoints with more steps are damaged, since the run was resumed from an earlier one.
    """
    kept = set([path for path in _checkpoints(work) if _step(path) <= step][-_KEPT:])
    for path in list(kept):
        best = json.loads((path / STATE).read_text(encoding="utf-8")).get("best_global_step")
        if best:
            kept.add(path.with_name(f"checkpoint-{best}"))
    for path in _checkpoints(work):
        if path not in kept:
            # The manifest goes first, so that what a kill may leave counts as damaged.
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)


def begin(work: Path, identity: Mapping[str, Any], write: bool) -> None:
    """Record a run's identity in its working directory, or check that the run there has the same one.

    A run from which nothing can be resumed is removed, whatever its identity.

    Args:
        work: The working directory.
        identity: ``settings``, ``text``, ``student``, ``teacher`` and ``processes``, as JSON values.
        write: Whether this process may write; the other processes of a run only check.

    Raises:
        InputError: The run in the directory has another identity; the message names what differs.
    """
    path = work / RUN
    if write and not holds_work(work):
        clear(work)
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            pass_on_memory(error)
            raise InputError(f"{path} cannot be read ({error}); remove {work} to begin anew.") from error
        changes = _changes(before, json.loads(json.dumps(identity)))
        if changes:
            raise InputError(
                f"{work} holds a run with other settings or inputs: {'; '.join(changes)}. Use those again, choose "
                f"another --out, or remove {work} to begin anew."
            )
        return
    if write:
        make_directories(work, remedy="choose another --out")
        write_file(path, (json.dumps(identity, indent=1) + "\n").encode())


def holds_work(work: Path) -> bool:
    """Whether a run can be resumed from its working directory: a block or a checkpoint is there."""
    return bool(_checkpoints(work)) or any(work.glob("blockwise/block-*")) or (work / "blocks").exists()


def clear(work: Path) -> None:
    """Remove everything that runs write into a working directory, and nothing else."""
    for pattern in ("run.*", "log.*", "start", "blocks", "blockwise", "checkpoint-*", ".*.partial"):
        for path in work.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences between two identities of runs, in words."""
    old, new = before.get("settings", {}), now["settings"]
    changes = [
        f"{key}={old.get(key)!r} then, {new.get(key)!r} now"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
    if before.get("processes") != now["processes"]:
        changes.append(f"{before.get('processes')} processes then, {now['processes']} now")
    named = {"text": "the text or its tokenizer", "student": "the model to heal", "teacher": "the teacher"}
    changes += [f"{what} changed since" for key, what in named.items() if before.get(key) != now[key]]
    return changes


def digest(identity: Mapping[str, Any]) -> str:
    """The first 32 hexadecimal digits of the SHA-256 of a run's identity."""
    return hash_json(identity)[:32]


def fingerprint(model: PreTrainedModel) -> str:
    """The first 32 hexadecimal digits of the SHA-256 of a model's configuration and of every byte of its state."""
    return hash_model(model)[:32]


def _checkpoints(work: Path) -> list[Path]:
    """All checkpoints, damaged or not, by rising step."""
    found = [path for path in work.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST)
