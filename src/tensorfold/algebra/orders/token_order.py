"""Orders of a table's rows in which rows that are alike share factors of a Kronecker or tensor-train fit.

Both structures split the place of a row into digits, ``place = (i1, i2)``, and rows share a factor where they share a
digit. So what a fit can reach depends on the order, and token indices were not given out with it in mind.

``cluster`` is principal direction divisive partitioning (Boley, "Principal Direction Divisive Partitioning", Data
Mining and Knowledge Discovery 2, 1998) with median splits: the rows are sorted along the leading principal direction of
all of them, cut in the middle, and each half is treated likewise, until groups have at most two rows. A group of n is
cut into ⌈n/2⌉ and ⌊n/2⌋, so of 2^k · m rows every level has blocks of equally many places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from tensorfold.errors import SpecError
from tensorfold.utils.validation import check_floating

TokenOrder = Literal["own", "frequency", "cluster"]

_CHUNK = 2**21  # elements of the table worked on at a time in fp32
_SMALL = 64  # rows of the largest group whose direction comes from the eigenvectors of its inner products
_BLOCK = 8  # vectors of the subspace iteration
_SWEEPS = 4  # passes of the subspace iteration over the rows


def token_order(kind: TokenOrder, table: Tensor, counts: Tensor | None = None) -> Tensor | None:
    """Order of a table's rows for a fit: which row comes at each place.

    Args:
        kind: ``own`` leaves the rows as they are; ``frequency`` sorts by falling counts, equally frequent tokens in
            their own order; ``cluster`` puts similar rows next to each other.
        table: Shape (vocabulary, width).
        counts: How often each token is used, shape (vocabulary,); for ``frequency``.

    Returns:
        int64, shape (vocabulary,); None for ``own``.

    Raises:
        SpecError: ``frequency`` without counts, or with those of another vocabulary.
    """
    if kind == "own":
        return None
    if kind == "cluster":
        return cluster_order(table)
    if counts is None or tuple(counts.shape) != (len(table),):
        got = "none" if counts is None else f"counts of shape {tuple(counts.shape)}"
        raise SpecError(f"order: frequency: got {got}; needed how often each of the {len(table)} tokens is used.")
    return counts.argsort(descending=True, stable=True).to(table.device)


@torch.no_grad()
def cluster_order(table: Tensor) -> Tensor:
    """Order that puts similar rows of a table next to each other: principal direction divisive partitioning.

    It works level by level and in chunks of 2^21 numbers, so that it needs a small part of the table's own memory. A
    level of large groups takes about 80 multiply–adds for every number of the table. Equal tables give equal orders.

    Args:
        table: Shape (rows, width), any floating dtype.

    Returns:
        int64, shape (rows,): the row at each place.

    Raises:
        SpecError: The table is not a matrix, or holds NaN or infinity.
    """
    usable = table.dim() == 2 and table.numel() > 0
    check_floating(table=table)
    # In chunks, because torch.isfinite makes a copy.
    if not usable or not all(bool(rows.isfinite().all()) for rows in table.split(max(1, _CHUNK // table.shape[1]))):
        raise SpecError(
            f"cluster_order: got a table of shape {tuple(table.shape)}; needed (rows, width), without NaN or infinity."
        )
    order = torch.arange(len(table), device=table.device)
    sizes = [len(table)]
    while max(sizes) > 2:
        starts = list(accumulate(sizes, initial=0))
        for size in sorted(set(sizes) - {1, 2}):
            first = torch.tensor([s for s, n in zip(starts, sizes, strict=False) if n == size], device=table.device)
            places = first[:, None] + torch.arange(size, device=table.device)  # (groups, size)
            for some in places.split(max(1, _CHUNK // (size * table.shape[1]))):
                order[some] = _sorted(table, order[some])
        sizes = [half for size in sizes for half in (size - size // 2, size // 2) if half]
    return order


def _sorted(table: Tensor, groups: Tensor) -> Tensor:
    """Sort every group of row indices, (groups, size), along the leading principal direction of its rows."""
    size, width = groups.shape[1], table.shape[1]
    pieces = groups.split(max(1, _CHUNK // width), dim=1)
    kept: list[Tensor] = []

    def centred() -> Iterator[Tensor]:
        return iter(kept) if kept else (table[piece].float() - means for piece in pieces)  # each (groups, some, width)

    means = torch.stack([table[piece].float().sum(1, keepdim=True) for piece in pieces]).sum(0) / size
    if len(pieces) == 1:
        kept = list(centred())
    directions = _exact(kept[0]) if kept and size <= _SMALL else _iterated(centred, width, table.device)
    # Eigensolvers may give either sign.
    peak = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    directions = directions * torch.where(peak < 0, -1.0, 1.0)
    places = torch.cat([(rows @ directions[:, :, None]).squeeze(-1) for rows in centred()], dim=1)
    return groups.gather(1, places.argsort(dim=1, stable=True))


def _exact(rows: Tensor) -> Tensor:
    """Leading right singular vectors of (groups, size, width), up to their length, from inner products of rows.

    Returns:
        Shape (groups, width).
    """
    left = torch.linalg.eigh(rows @ rows.mT).eigenvectors[:, :, -1:]
    return (rows.mT @ left).squeeze(-1)


def _iterated(read: Callable[[], Iterator[Tensor]], width: int, device: torch.device) -> Tensor:
    """Leading right singular vectors, (groups, width), by subspace iteration from a fixed start.

    Source: Halko, Martinsson & Tropp, arXiv 0909.4061, Algorithm 4.4.

    Args:
        read: Passes once over all rows, in pieces (groups, some, width).
        width: Length of a row.
        device: Where the rows are.
    """
    basis = torch.randn(width, min(_BLOCK, width), generator=torch.Generator().manual_seed(0)).to(device)
    for _ in range(_SWEEPS):
        image = torch.stack([rows.mT @ (rows @ basis) for rows in read()]).sum(0)
        basis = torch.linalg.qr(image).Q  # (groups, width, block)
    within = torch.stack([part.mT @ part for rows in read() for part in [rows @ basis]]).sum(0)
    return (basis @ torch.linalg.eigh(within).eigenvectors[:, :, -1:]).squeeze(-1)
