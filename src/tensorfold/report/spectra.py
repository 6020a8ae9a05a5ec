"""Singular values at the bonds of folded matrices, computed from the cores in a checkpoint's files."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from tensorfold.algebra.specs.structure import Structure
from tensorfold.algebra.spectrum import bond_spectra
from tensorfold.errors import InputError


def read_spectra(
    files: Sequence[Path], specs: Mapping[str, Structure], int8: Container[str], step: Callable[[str], None]
) -> dict[str, tuple[Tensor, ...]]:
    """Bond spectra of the folded modules that are one chain of cores, by full name.

    Args:
        files: Safetensors files of the checkpoint.
        specs: Structures of its folded modules, by full name.
        int8: Names of modules that are in int8.
        step: Called with the name of each thing that is worked on.

    Raises:
        InputError: A tensor is missing, or is not what its structure says.
    """
    holders = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            holders.update(dict.fromkeys(tensors.keys(), file))
    found = {}
    for name, spec in specs.items():
        if not spec.is_chain:
            continue
        step(f"spectra of {name}")
        values = partial(_values, holders, name, name in int8)
        cores = [values(f"cores.{k}", shape) for k, shape in enumerate(spec.stored_shapes)]
        scalars = values("scalars", (spec.scalar_count,)) if spec.scalar_count else None
        found[name] = tuple(bond_spectra(spec.complete(cores, scalars)))
    return found


def _values(holders: Mapping[str, Path], module: str, int8: bool, name: str, shape: tuple[int, ...]) -> Tensor:
    """Parameter of a folded module in float64; int8 codes are multiplied by their scales."""
    if not int8:
        return _tensor(holders, f"{module}.{name}", shape)
    key = name.replace(".", "_")
    codes = f"{module}.codes.{key}"
    if codes not in holders:
        return _tensor(holders, f"{module}.others.{key}", shape)
    scales = _tensor(holders, f"{module}.scales.{key}", (*shape[:2], *(1 for _ in shape[2:])))
    return _tensor(holders, codes, shape, torch.int8) * scales


def _tensor(holders: Mapping[str, Path], name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Stored tensor, converted to float64.

    Args:
        holders: File of every tensor, by name.
        name: Name of the tensor.
        shape: Shape that it must have.
        dtype: Type that it must be stored in; any floating-point type if None.

    Raises:
        InputError: It is missing, of another shape or type, or not finite.
    """
    if name not in holders:
        raise InputError(f"the checkpoint lacks the tensor {name}; it is incomplete or not of this model.")
    with safe_open(holders[name], framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(name)
    if tuple(tensor.shape) != shape or not (tensor.dtype == dtype if dtype else tensor.is_floating_point()):
        needed = str(dtype).removeprefix("torch.") if dtype else "floating point"
        raise InputError(f"{name} has the shape {tuple(tensor.shape)}, needed {shape} in {needed}.")
    if not torch.isfinite(tensor).all():
        raise InputError(f"{name} holds NaN or infinity; repair the checkpoint.")
    return tensor.double()
