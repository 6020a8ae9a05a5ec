"""Checkpoints that are whole or absent, and that are known to be damaged before they are used.

A working directory holds ``run.json`` (what the run was begun with), ``log.jsonl``, and directories with a
``manifest.json`` of the SHA-256 of every file in them: ``start`` (the weights that came in), ``blocks`` (those after
all blocks; each block by itself is in ``blockwise``) and ``checkpoint-STEP``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from tensorfold.errors import InputError, TensorfoldError, pass_on_memory
from tensorfold.utils.atomic_files import atomic_directory, make_directories
from tensorfold.utils.fingerprints import hash_file, hash_model

log = logging.getLogger(__name__)

MANIFEST, RUN, STATE = "manifest.json", "run.json", "trainer_state.json"
_KEPT = 2


@contextmanager
def sealed(target: Path) -> Iterator[Path]:
    """Yield a directory that becomes ``target``, with a manifest, when the block ends without an error.

    Raises:
        TensorfoldError: It could not be written; what was there before is as it was.
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
    """What is wrong with a sealed directory, or None."""
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
    """The checkpoint with the most steps whose checksums hold; a damaged one is passed over with a warning."""
    for path in reversed(_checkpoints(work)):
        reason = damage(path)
        if reason is None:
            return path
        log.warning("%s is damaged (%s); going on from the checkpoint before it", path, reason)
    return None


def rotate(work: Path, step: int) -> None:
    """Keep the last two checkpoints up to ``step``, and the best by validation that each of them refers to.

    What has more steps was damaged, or the run would not have been at ``step``.
    """
    kept = set([path for path in _checkpoints(work) if _step(path) <= step][-_KEPT:])
    for path in list(kept):
        best = json.loads((path / STATE).read_text(encoding="utf-8")).get("best_global_step")
        if best:
            kept.add(path.with_name(f"checkpoint-{best}"))
    for path in _checkpoints(work):
        if path not in kept:
            # The manifest goes first: what a kill leaves of it is then known to be damaged.
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)


def begin(work: Path, identity: Mapping[str, Any], write: bool) -> None:
    """Claim a working directory for a run, or check that the run in it is this one.

    A run that finished nothing leaves nothing to go on from, so it does not stand in the way of another.

    Args:
        identity: ``settings``, ``text``, ``student``, ``teacher`` and ``processes``; equal for equal runs.
        write: Whether this process may write; the others only check.

    Raises:
        InputError: The run in it was begun with something else; the message names what.
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
                f"{work} holds a run that was begun otherwise: {'; '.join(changes)}. Go back to that, choose another "
                f"--out, or remove {work} to begin anew."
            )
        return
    if write:
        make_directories(work, remedy="choose another --out")
        temporary = path.with_suffix(".partial")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(identity, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def holds_work(work: Path) -> bool:
    """Whether a run got so far that there is something to go on from: a block, or a checkpoint."""
    return bool(_checkpoints(work)) or any(work.glob("blockwise/block-*")) or (work / "blocks").exists()


def clear(work: Path) -> None:
    """Remove what runs write into a working directory, and nothing else."""
    for pattern in ("run.*", "log.*", "start", "blocks", "blockwise", "checkpoint-*", ".*.partial"):
        for path in work.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
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
    """Short name of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def fingerprint(model: PreTrainedModel) -> str:
    """Hash of a model's configuration and of every byte of its state: another training of it is another model."""
    return hash_model(model)[:32]


def _checkpoints(work: Path) -> list[Path]:
    found = [path for path in work.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST)
