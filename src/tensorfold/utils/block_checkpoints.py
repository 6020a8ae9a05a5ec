"""Checkpoints of work on one transformer block after another: a directory for each block, whole or absent."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from tensorfold.errors import InputError, pass_on_memory
from tensorfold.utils.atomic_files import atomic_directory, make_directories

log = logging.getLogger(__name__)

_CORES, _SIDECAR = "cores.safetensors", "block.json"


class BlockCheckpoints:
    """Finished blocks on disk: ``block-0003/cores.safetensors``, with its checksum in ``block.json``.

    Blocks have to be loaded or saved in order. Each records the checksum of the block before it, to whose outputs it
    was fitted: where a damaged block is computed again and gives the same bytes, the later ones stay valid. Data too
    large to hold in memory until a block is finished goes to files in a :meth:`folder`, which are saved with it.

    Args:
        directory: Directory of all blocks, created with the first.
        key: Identity of the run: a hash of everything that decides the result.
        what: Kind of run, for messages.
    """

    def __init__(self, directory: Path, key: str, what: str) -> None:
        self._directory = directory
        self._key = key
        self._what = what
        self._previous = ""

    def load(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors of a block and the ``outcome`` saved with them; None where the block must be computed.

        A damaged block, or one that was fitted to another block before it, counts as missing, with a warning.

        Raises:
            InputError: The block is of another run.
        """
        path = self._path(index)
        if not path.exists():
            return None
        try:
            sidecar = json.loads((path / _SIDECAR).read_text(encoding="utf-8"))
            key, previous, digest, outcome = (sidecar[name] for name in ("run", "previous", "sha256", "outcome"))
            content = (path / _CORES).read_bytes()
            if self._digest(content, sidecar.get("files", ())) != digest:
                raise ValueError(f"the checksum of {_CORES}, or of a file beside it, differs")
            if key == self._key and previous != self._previous:
                raise ValueError("a block before it has changed")
            tensors = load_tensors(content)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            pass_on_memory(error)
            log.warning("checkpoint %s cannot be used (%s); the block is computed again", path, error)
            return None
        if key != self._key:
            raise InputError(
                f"{self._directory} holds blocks of another {self._what}: model, text or settings differ. Name another "
                "directory, or remove this one to start anew."
            )
        self._previous = digest
        return tensors, dict(outcome)

    def folder(self, name: str) -> Path:
        """The directory for files that are written while a block is computed, created where it is missing.

        Raises:
            InputError: It cannot be created.
            TensorfoldError: The disk is full.
        """
        path = self._directory / name
        make_directories(path, remedy=f"free its name, or remove {self._directory} to start anew")
        return path

    def save(
        self, index: int, tensors: Mapping[str, Tensor], outcome: Mapping[str, Any], files: Iterable[Path] = ()
    ) -> None:
        """Write a block, replacing one that is there.

        Args:
            index: The block's index.
            tensors: Its tensors, by name.
            outcome: JSON values to keep with them.
            files: Complete files below the directory that belong to the block: if one changes, the block is damaged.

        Raises:
            TensorfoldError: The disk is full.
        """
        beside = [path.relative_to(self._directory).as_posix() for path in files]
        content = save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        digest = self._digest(content, beside)
        sidecar: dict[str, Any] = {"run": self._key, "previous": self._previous, "sha256": digest}
        sidecar |= {"files": beside, "outcome": dict(outcome)}
        with atomic_directory(self._path(index), replace=True) as partial:
            (partial / _CORES).write_bytes(content)
            (partial / _SIDECAR).write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")
        self._previous = digest

    def _digest(self, content: bytes, files: Iterable[str]) -> str:
        """SHA-256 of a block's serialised tensors and of the files that belong to it."""
        digest = hashlib.sha256(content)
        for name in files:
            with (self._directory / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def _path(self, index: int) -> Path:
        return self._directory / f"block-{index:04d}"
