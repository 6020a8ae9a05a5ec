"""Layers whose weight other code reads by name, past their forward: nothing else can stand in their place.

Examples are ``F.linear(x, self.gate.weight)`` of a router, the kernels of state-space layers, and
``self.proj.weight.dtype``. They are found in the bytecode of the modules around a layer, so that no weights are needed
and nothing has to be run.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator
from types import FunctionType

from torch import nn

_SETUP = ("__init__", "_init_weights", "tie_weights")


def is_read_directly(model: nn.Module, name: str) -> bool:
    """Whether a module on the way down to a layer reads that layer's weight itself.

    Args:
        model: Any module.
        name: Full name of the layer in it.
    """
    *path, leaf = name.split(".")
    around = (model.get_submodule(".".join(path[:end])) for end in range(len(path) + 1))
    return any(leaf in _read_by(type(module)) for module in around)  # type: ignore[arg-type]


@functools.cache
def _read_by(kind: type) -> frozenset[str]:
    """Names of attributes whose ``weight`` is read by the methods of a class.

    Slices of a weight do not count where the class also calls the layer: they are for slices of tensor parallelism
    (BLOOM's ``pretraining_tp``), a path that is off by default.
    """
    read: set[str] = set()
    sliced: set[str] = set()
    called: set[str] = set()
    for method in _methods(kind):
        instructions = [*dis.get_instructions(method)]
        for here, after, last in zip(instructions, instructions[1:], instructions[2:], strict=False):
            if here.opname == "LOAD_METHOD" or (here.opname == "LOAD_ATTR" and "NULL|self" in here.argrepr):
                called.add(here.argval)
            elif here.opname == "LOAD_ATTR" and after.opname == "LOAD_ATTR" and after.argval == "weight":
                is_slice = last.opname == "LOAD_CONST" or last.argval == "shape"
                (sliced if is_slice else read).add(here.argval)
    return frozenset(read | (sliced - called))


def _methods(kind: type) -> Iterator[FunctionType]:
    """Methods of a class and its bases, without those of torch, of transformers' shared bases and of set-up."""
    for base in kind.__mro__:
        place = base.__module__
        shared = place.startswith("transformers.") and not place.startswith("transformers.models.")
        if shared or place.partition(".")[0] in ("torch", "builtins", "abc", "typing"):
            continue
        for name, attribute in vars(base).items():
            method = inspect.unwrap(attribute) if callable(attribute) else attribute
            if name not in _SETUP and inspect.isfunction(method):
                yield method
