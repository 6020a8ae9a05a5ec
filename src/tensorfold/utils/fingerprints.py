"""SHA-256 of tensors, models, files and JSON values, over all their bytes.

A run is resumed only where these hashes are the same as before. SHA-256 reads one to two gigabytes a second where the
processor has instructions for it: a model of 500 MB costs half a second, once a run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_BLOCK = 1 << 24  # bytes copied at a time from a device to the CPU


def hash_tensor(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and values; on the meta device of dtype and shape alone."""
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if not tensor.is_meta:
        for block in _blocks(tensor.detach()):
            found.update(block.view(torch.uint8).numpy().data)
    return found.hexdigest()


def hash_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of named tensors: of their values, names and order."""
    found = hashlib.sha256()
    for name, tensor in named:
        found.update(f"{name} {hash_tensor(tensor)}\n".encode())
    return found.hexdigest()


def saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a model's state dict: parameters and persistent buffers, a tied tensor once."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def describe_configuration(configuration: Any) -> str:
    """The part of a transformers configuration that decides a model's outputs, as JSON.

    Its path and the version of transformers that wrote it are left out.
    """
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


def hash_json(value: Any) -> str:
    """SHA-256 of a JSON value; the order of keys makes no difference."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's values in order, as consecutive flat tensors on the CPU; one alone where it lies there already."""
    flat = tensor.reshape(-1)
    if not flat.numel():
        return
    if flat.device.type == "cpu":
        yield flat
        return
    for block in flat.split(max(1, _BLOCK // flat.element_size())):
        yield block.cpu()
