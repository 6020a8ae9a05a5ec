"""Hashes of all bytes: of a tensor, of a model, of a file.

What lets a run resume, or refuse to, compares these. SHA-256 reads one to two gigabytes a second where the processor
has instructions for it: a model of 500 MB costs half a second, once a run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_BLOCK = 1 << 24  # bytes that are copied at a time from where the processor cannot read them


def hash_tensor(tensor: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and values; of type and shape alone where it has no values."""
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if not tensor.is_meta:
        for block in _blocks(tensor.detach()):
            found.update(block.view(torch.uint8).numpy().data)
    return found.hexdigest()


def hash_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of tensors, their names and their order."""
    found = hashlib.sha256()
    for name, tensor in named:
        found.update(f"{name} {hash_tensor(tensor)}\n".encode())
    return found.hexdigest()


def saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a model's state: parameters, and the buffers that are saved with them; ties once."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def describe_configuration(configuration: Any) -> str:
    """What of a transformers configuration decides a model's outputs, as JSON; not where it lies, nor who wrote it."""
    return json.dumps(
        {
            key: value
            for key, value in configuration.to_dict().items()
            if not key.startswith("_") and key != "transformers_version"
        },
        sort_keys=True,
        default=str,
    )


def hash_model(model: Any) -> str:
    """SHA-256 of a transformers model: every byte of its state, and its configuration."""
    found = hashlib.sha256(describe_configuration(model.config).encode())
    found.update(hash_tensors(saved_tensors(model)).encode())
    return found.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """The values as one row after another on the CPU: in one piece where that copies nothing."""
    flat = tensor.reshape(-1)
    if not flat.numel():
        return
    if flat.device.type == "cpu":
        yield flat
        return
    for block in flat.split(max(1, _BLOCK // flat.element_size())):
        yield block.cpu()
