"""Applying a matrix product operator to vectors without building the matrix, and building it.

A vector index ``(j1 … jL)`` is contracted one site at a time. The sites done so far are always an interval; the state
between two steps has layout ``(tokens, j<, r, i…, r', j>)`` with ``j<`` and ``j>`` the inputs not yet read. Each step
is one matrix product, so an order of sites is a start and a sequence of moves left or right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorfold.algebra.spec import Spec


@dataclass(frozen=True)
class Order:
    """A contraction order: the first site, then ``"L"`` or ``"R"`` for each further one; its multiply–adds a token."""

    start: int
    moves: str
    macs: int


@lru_cache(maxsize=4096)
def cheapest_order(spec: Spec) -> Order:
    """The order with the fewest multiply–adds a token, by dynamic programming over intervals of sites, O(L²)."""
    m, n, bonds = spec.out_modes, spec.in_modes, (1, *spec.ranks, 1)
    sites = spec.sites
    before = [math.prod(n[:k]) for k in range(sites + 1)]
    after = [math.prod(n[k:]) for k in range(sites + 1)]

    best = {
        (k, k + 1): Order(k, "", before[k] * bonds[k] * m[k] * n[k] * bonds[k + 1] * after[k + 1]) for k in range(sites)
    }
    for width in range(2, sites + 1):
        for a in range(sites - width + 1):
            b = a + width
            outputs = math.prod(m[a:b])
            # The last site added is either the rightmost (move R) or the leftmost (move L) of the interval [a, b).
            last_right = before[a] * bonds[a] * outputs * bonds[b - 1] * n[b - 1] * bonds[b] * after[b]
            last_left = before[a] * bonds[a] * n[a] * bonds[a + 1] * outputs * bonds[b] * after[b]
            best[a, b] = min(
                Order(best[a, b - 1].start, best[a, b - 1].moves + "R", best[a, b - 1].macs + last_right),
                Order(best[a + 1, b].start, best[a + 1, b].moves + "L", best[a + 1, b].macs + last_left),
                key=lambda order: order.macs,
            )
    return best[0, sites]


def apply(
    x: Tensor, cores: Sequence[Tensor], spec: Spec, bias: Tensor | None = None, order: Order | None = None
) -> Tensor:
    """``x @ W.T + bias`` for the matrix W that ``cores`` stand for.

    Args:
        x: Shape (..., in_features).
        cores: One tensor a site, shapes ``spec.core_shapes``.
        bias: Shape (out_features,) or None.
        order: The order of the sites; :func:`cheapest_order` if not given.

    Returns:
        Shape (..., out_features).
    """
    order = order or cheapest_order(spec)
    m, n, bonds = spec.out_modes, spec.in_modes, (1, *spec.ranks, 1)
    padding = math.prod(n) - spec.in_features
    state = F.pad(x, (0, padding)) if padding else x
    lead = x.shape[:-1]
    tokens = math.prod(lead)

    a, b = order.start, order.start + 1
    left, right = math.prod(n[:a]), math.prod(n[b:])
    core = cores[a]  # (r, m, n, r')
    state = _step(
        state.reshape(tokens * left, n[a], right), core.permute(0, 1, 3, 2).reshape(-1, n[a])
    )  # (tokens·j<, r·i·r', j>)
    outputs = m[a]
    for move in order.moves:
        if move == "R":
            right //= n[b]
            core = cores[b].permute(1, 3, 0, 2).reshape(-1, bonds[b] * n[b])  # (i·r', r·j)
            state = _step(state.reshape(tokens * left * bonds[a] * outputs, bonds[b] * n[b], right), core)
            outputs *= m[b]
            b += 1
        else:
            a -= 1
            left //= n[a]
            core = cores[a].reshape(-1, n[a] * bonds[a + 1])  # (r·i, j·r')
            state = _step(state.reshape(tokens * left, n[a] * bonds[a + 1], outputs * bonds[b] * right), core)
            outputs *= m[a]
    y = state.reshape(*lead, math.prod(m))
    if y.shape[-1] != spec.out_features:
        y = y[..., : spec.out_features]
    return y if bias is None else y + bias


def _step(state: Tensor, core: Tensor) -> Tensor:
    """Contract the middle axis: ``state`` (B, c, N) with ``core`` (d, c) gives (B, d, N)."""
    if state.shape[-1] == 1:
        return F.linear(state.squeeze(-1), core).unsqueeze(-1)
    return torch.matmul(core, state)


def to_dense(cores: Sequence[Tensor], spec: Spec) -> Tensor:
    """The matrix itself, shape (out_features, in_features), padding cut off."""
    dense = cores[0].squeeze(0)  # (I, J, r)
    for core in cores[1:]:
        i, j, _ = dense.shape
        _, m, n, r = core.shape
        dense = torch.einsum("ijr,rmns->imjns", dense, core).reshape(i * m, j * n, r)
    return dense.squeeze(-1)[: spec.out_features, : spec.in_features]


def rows(index: Tensor, cores: Sequence[Tensor], spec: Spec) -> Tensor:
    """Rows of the matrix, reading only the core slices they need.

    Args:
        index: Integers of any shape (...), each in ``[0, out_features)``.

    Returns:
        Shape (..., in_features).
    """
    flat = index.reshape(-1)
    state: Tensor | None = None  # (tokens, J, r)
    stride = math.prod(spec.out_modes)
    for core, m in zip(cores, spec.out_modes, strict=True):
        r, _, n, s = core.shape
        stride //= m
        if m == 1:
            matrix = core.reshape(r, n * s)
            step = matrix if state is None else state @ matrix  # (tokens, J, n·s)
        else:
            slices = core.movedim(1, 0)[flat // stride % m].reshape(-1, r, n * s)
            step = slices if state is None else state @ slices
        state = step.reshape(step.shape[0] if step.dim() == 3 else 1, -1, s)
    assert state is not None
    out = state.squeeze(-1).expand(flat.numel(), -1)[:, : spec.in_features]
    return out.reshape(*index.shape, spec.in_features)
