"""Other libraries that apply matrix product operators, where they are installed: tensorly-torch and pyfastkron.

They are given the cores of a layer, so they have to give its outputs; a library that does not is left out and named.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from tensorfold.nn import StructuredLinear

Call = Callable[[Tensor], Tensor]

# Largest difference allowed from the layer's own outputs, as a part of its largest output.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
_HALF_TOLERANCE = 0.05


@dataclass(frozen=True)
class Rival:
    """A library that is timed beside folded layers.

    Attributes:
        name: Name of its package.
        module: Module to import.
        build: Makes a function of inputs from a layer, or returns the reason why it cannot.
    """

    name: str
    module: str
    build: Callable[[StructuredLinear], Call | str]

    @property
    def missing(self) -> bool:
        """Whether the library is not installed."""
        return importlib.util.find_spec(self.module) is None

    @property
    def version(self) -> str:
        """Version of the installed package."""
        try:
            return version(self.name)
        except PackageNotFoundError:
            return "of unknown version"


def _tensorly_torch(layer: StructuredLinear) -> Call | str:
    """tensorly-torch's ``FactorizedLinear`` over a ``BlockTT`` of a layer's cores; the matrix is not built."""
    spec = layer.spec
    if spec.is_padded:
        return "has no padded modes"
    tltorch = _import("tltorch")
    cores = [core.detach() for core in layer.factors()]
    tensor = tltorch.BlockTT(cores, tensorized_shape=(spec.out_modes, spec.in_modes), rank=(1, *spec.ranks, 1))
    rival = tltorch.FactorizedLinear(
        spec.in_modes, spec.out_modes, bias=layer.bias is not None, factorization=tensor, implementation="factorized"
    )
    if layer.bias is not None:
        rival.bias = torch.nn.Parameter(layer.bias.detach())
    return rival  # type: ignore[no-any-return]


def _pyfastkron(layer: StructuredLinear) -> Call | str:
    """pyfastkron's ``x (F1 ⊗ F2 ⊗ …)`` with ``Fk`` a layer's transposed factors, laid out for its kernels."""
    spec = layer.spec
    if set(spec.ranks) != {1}:
        return "takes single Kronecker products only"
    if spec.is_padded:
        return "has no padded modes"
    kron = _import("pyfastkron.fastkrontorch")
    factors = [core.detach().squeeze(-1).squeeze(0).T.contiguous() for core in layer.factors()]
    if not kron.fastkrontorch.isSupported(factors[0], factors):
        kind = str(factors[0].dtype).removeprefix("torch.")
        return f"has no kernels for {kind} on {factors[0].device.type} on this machine"
    bias = None if layer.bias is None else layer.bias.detach()

    def call(x: Tensor) -> Tensor:
        y: Tensor = kron.gemkm(x, factors)
        return y if bias is None else y.add_(bias)

    return call


def _import(module: str) -> Any:
    """Import a module with as many OpenMP threads as torch has; pyfastkron's own OpenMP asks only when it is loaded."""
    previous = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    try:
        return importlib.import_module(module)
    finally:
        if previous is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = previous


RIVALS = (
    Rival("tensorly-torch", "tltorch", _tensorly_torch),
    Rival("pyfastkron", "pyfastkron", _pyfastkron),
)


def installed() -> tuple[list[Rival], list[str]]:
    """Rivals that are installed, and a line about every rival: its version, or that it is missing."""
    found = [rival for rival in RIVALS if not rival.missing]
    lines = [
        f"{rival.name} is not installed: left out" if rival.missing else f"{rival.name} {rival.version}"
        for rival in RIVALS
    ]
    return found, lines


@torch.no_grad()
def competitor(rival: Rival, layer: StructuredLinear, x: Tensor) -> Call | str:
    """Build a rival's function for a layer and check that it gives the layer's outputs.

    Args:
        rival: The library.
        layer: Folded layer.
        x: Inputs to check with, shape (tokens, in).

    Returns:
        The function; or the reason why the rival is left out, as the end of a sentence.
    """
    if layer.spec.reordered:
        return "has no index orders"
    try:
        call = rival.build(layer)
        if isinstance(call, str):
            return call
        expected, got = layer(x), call(x)
    # Another library fails on shapes it was not made for in ways of its own; the benchmark goes on without it.
    except Exception as error:
        return f"fails ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    if got.shape != expected.shape:
        return f"gives shape {tuple(got.shape)}, needed {tuple(expected.shape)}"
    difference = (got - expected).abs().max().item() / max(expected.abs().max().item(), 1e-30)
    if not difference <= _TOLERANCE.get(x.dtype, _HALF_TOLERANCE):
        return f"gives other outputs than the layer (by {difference:.0e} of the largest)"
    return call
