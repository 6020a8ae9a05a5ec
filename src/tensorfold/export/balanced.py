"""Pivoted low rank as two factors of equal weight, for exports in four bits.

Pivots are rows of the matrix and T mixes them: ``W = [I; T] S``. Both are rounded badly: an error of a pivot goes into
its own output and, through T, into all others. ``U V`` with the singular values divided between both factors has r²
numbers more and, in four bits, far smaller errors; that is what graphs in four bits hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from tensorfold.algebra.solvers.solve import Factors
from tensorfold.algebra.specs.spec import Spec
from tensorfold.nn import StructuredLinear, linear_class


@contextmanager
def balanced_factors(model: PreTrainedModel, multiple: int) -> Iterator[None]:
    """Let pivoted low-rank layers be ``U V`` with balanced factors while the context is open.

    Args:
        model: Has its own layers back afterwards.
        multiple: What divides the ranks, filled up with zeros, so that groups of so many numbers divide.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, StructuredLinear)}
    owners = Counter(id(core) for layer in layers.values() for core in layer.cores)
    tables = {id(core) for module in model.modules() if not isinstance(module, StructuredLinear)
              for core in getattr(module, "cores", ())}  # fmt: skip
    pivoted = {
        name: layer
        for name, layer in layers.items()
        if layer.spec.is_chain
        and layer.spec.has_pivot_rows
        and all(owners[id(core)] == 1 and id(core) not in tables for core in layer.cores)
    }
    for name, layer in pivoted.items():
        model.set_submodule(name, _balanced(layer, multiple))
    try:
        yield
    finally:
        for name, layer in pivoted.items():
            model.set_submodule(name, layer)


@torch.no_grad()
def _balanced(layer: Any, multiple: int) -> StructuredLinear:
    """A layer of the same matrix whose factors U (out, r) and V (r, in) have the roots of its singular values each."""
    spec = layer.spec
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
