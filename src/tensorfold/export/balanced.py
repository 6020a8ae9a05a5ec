"""Factors of low rank made ready for graphs in few bits.

In eight and four bits both factors are rounded together (:mod:`tensorfold.algebra.solvers.rounding`), before a graph is
traced; the engines' packers then round to the same numbers. Pivoted low rank is two factors of equal weight in four:
pivots are rows of the matrix and T mixes them: ``W = [I; T] S``. Both are rounded badly: an error of a pivot goes into
its own output and, through T, into all others. ``U V`` with the singular values divided between both factors has r²
numbers more and, in four bits, far smaller errors; that is what graphs in four bits hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tensorfold.algebra.solvers.rounding import Grid
from tensorfold.algebra.solvers.solve import Factors
from tensorfold.algebra.specs.spec import Spec
from tensorfold.export.openvino_weights import GROUP
from tensorfold.nn import StructuredLinear, linear_class
from tensorfold.nn.rounded import rounded_cores

# What the packers leave as it is: NNCF's symmetric integers a row, or a group in four bits, and MatMulNBits's.
_GRIDS = {
    ("openvino", 8): Grid(128, signed=True),
    ("openvino", 4): Grid(8, signed=True, group=GROUP),
    ("onnx", 8): Grid(128, signed=True, group=GROUP),
    ("onnx", 4): Grid(8, signed=True, group=GROUP),
}


@contextmanager
def in_few_bits(model: PreTrainedModel, to: str, bits: int, fitted: bool = False) -> Iterator[None]:
    """Let a model hold, while the context is open, what its graph in so many bits is traced from.

    Args:
        model: Has its own layers and numbers back afterwards.
        to: Engine.
        bits: In 8 and 4 factors are rounded together, in 4 pivots are none before that.
        fitted: Whether the packer fits scales to a text, and so rounds to others than are known here.
    """
    with balanced_factors(model, GROUP) if bits == 4 else nullcontext():
        grid = None if fitted else _GRIDS.get((to, bits))
        head = model.get_output_embeddings() if bits == 4 else None  # packers give it eight bits
        with _rounded(model, grid, to == "onnx", head) if grid is not None else nullcontext():
            yield


@contextmanager
def _rounded(model: PreTrainedModel, grid: Grid, filled: bool, apart: Any) -> Iterator[None]:
    """Let factors, but those of ``apart``, lie on a grid; without ``filled`` not where a last group is shorter.

    NNCF then takes other groups.
    """
    size, before = 1 if filled or grid.group is None else grid.group, []
    try:
        for layer in _unshared(model).values():
            if layer is apart or any(number % size for number in (layer.spec.in_features, *layer.spec.ranks)):
                continue
            for core, rounded in zip(layer.cores, rounded_cores(layer, grid), strict=False):
                before.append((core, core.detach().clone()))
                _set(core, rounded)
        yield
    finally:
        for core, own in before:
            _set(core, own)


@torch.no_grad()
def _set(core: Tensor, values: Tensor) -> None:
    core.copy_(values)


@contextmanager
def balanced_factors(model: PreTrainedModel, multiple: int) -> Iterator[None]:
    """Let pivoted low-rank layers be ``U V`` with balanced factors, or dense, while the context is open.

    Args:
        model: Has its own layers back afterwards.
        multiple: What divides the ranks, filled up with zeros, so that groups of so many numbers divide.
    """
    pivoted = {
        name: layer for name, layer in _unshared(model).items() if layer.spec.is_chain and layer.spec.has_pivot_rows
    }
    for name, layer in pivoted.items():
        model.set_submodule(name, _balanced(layer, multiple))
    try:
        yield
    finally:
        for name, layer in pivoted.items():
            model.set_submodule(name, layer)


def _unshared(model: PreTrainedModel) -> dict[str, Any]:
    """Structured linear layers whose cores are no other module's."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, StructuredLinear)}
    owners = Counter(id(core) for layer in layers.values() for core in layer.cores)
    tables = {id(core) for module in model.modules() if not isinstance(module, StructuredLinear)
              for core in getattr(module, "cores", ())}  # fmt: skip
    return {
        name: layer
        for name, layer in layers.items()
        if all(owners[id(core)] == 1 and id(core) not in tables for core in layer.cores)
    }


@torch.no_grad()
def _balanced(layer: Any, multiple: int) -> nn.Module:
    """A layer of the same matrix whose factors U (out, r) and V (r, in) have the roots of its singular values each.

    It is dense where the two have as many numbers as the matrix.
    """
    spec = layer.spec
    filled = spec.ranks[0] + -spec.ranks[0] % multiple
    if filled * (spec.out_features + spec.in_features) >= spec.out_features * spec.in_features:
        dense = nn.Linear(spec.in_features, spec.out_features, bias=layer.bias is not None)
        dense.weight.copy_(layer.to_dense())
        if layer.bias is not None:
            dense.bias.copy_(layer.bias)
        return dense.train(layer.training)
    top, pivots = (core.detach().double() for core in layer.factors())
    rank = spec.ranks[0]
    left = F.pad(top.reshape(-1, rank), (0, 0, 0, 1))[layer.out_position]  # (out, r)
    right = pivots.reshape(rank, -1)
    if layer.in_order is not None:
        right = right.new_zeros(rank, spec.in_features).index_copy(1, layer.in_order, right)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, values, v = torch.linalg.svd(r_left @ r_right.T)
    roots = values.sqrt()
    more = min(-rank % multiple, min(spec.out_features, spec.in_features) - rank)
    cores: list[Tensor] = [
        F.pad(q_left @ u * roots, (0, more))[None, :, None],
        F.pad(roots[:, None] * v @ q_right.T, (0, 0, 0, more))[:, None, :, None],
    ]
    plain = Spec.low_rank(spec.out_features, spec.in_features, rank + more)
    made = linear_class(plain).from_factors(Factors(cores), plain, layer.cores[0], layer.bias)
    return made.train(layer.training)
