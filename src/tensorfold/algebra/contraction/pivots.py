"""Applying pivoted low rank ``W[order] = [I; T] S`` to vectors, each in the way that its dtype and number ask for.

Notation:
    x           vectors, (tokens, in)
    S           pivots, rows of W, (r, in)
    T           coefficients of the other rows, (others, r)
    position    row of [I; T] that each output has, int64, (out,); one behind the last for outputs that are zero

On a processor the products are soon done, and bringing the outputs into their order takes as long: in bf16, where
PyTorch moves single numbers four times as slowly as in fp32, longer than a dense layer. So where the outputs can be in
any order, as the hidden units of an MLP can, the pivots are given places one behind the other, and nothing is brought
into order (:func:`first_of_pivots`). Elsewhere vectors in bf16 are columns, so that an output of all of them is a row,
which moves as a whole, and they are turned back at the end; factors then are the left sides of products, too, which
needs no copy of them in the processor's own layout. Where r² multiply–adds take less time than turning, as with matrix
units, many vectors are multiplied by ``[I; T]`` with its rows in order instead, which moves no output. A few vectors
are put in order as fp32.
"""

from __future__ import annotations

import threading
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

_FEW, _TILE = 64, 512  # tokens from which outputs are computed in tiles, and tokens of a tile
_TURNED = 8  # tokens in bf16 from which they are taken as columns
_TURNING = 72  # multiply–adds in bf16 without matrix units in the time in which a number is turned
_LEAST_SHARE = 3  # of the rank, as many tokens in bf16, from which on rows are put in order instead of outputs
_MANY = 256  # tokens in bf16 from which factors are filled up to whole registers of matrix units
_MOST_HELD = 2**22  # numbers
_ALIGNED = 32  # numbers in bf16 that matrix units take at once: other lengths take up to twice as long


def first_of_pivots(position: Tensor, rank: int, made: int) -> int | None:
    """Output at which all pivots begin, one behind the other, where the others are in order around them.

    Args:
        position: Row of [I; T] of each output.
        rank: Number of pivots.
        made: Pivots and other outputs; those that are zero have to come last.

    Returns:
        None where any other order is stored.
    """
    first = int((position >= rank).long().argmin()) if len(position) and position[0] >= rank else 0
    if first + rank > made:  # others lie among the pivots
        return None
    wanted = torch.full_like(position, made)
    wanted[:first] = torch.arange(rank, rank + first)
    wanted[first : first + rank] = torch.arange(rank)
    wanted[first + rank : made] = torch.arange(rank + first, made)
    return first if torch.equal(position, wanted) else None


def read_first(order: Tensor | None) -> int | None:
    """How many inputs an order (columns,) reads, where these are the first ones as they lie; None otherwise."""
    if order is None or not torch.equal(order, torch.arange(len(order), device=order.device)):
        return None
    return len(order)


def from_pivots(x: Tensor, others: Tensor, pivots: Tensor, position: Tensor, first: int | None, plain: bool) -> Tensor:
    """``[I; T] S x`` with outputs in their own order, shape (tokens, in) → (tokens, out).

    Args:
        x: Vectors.
        others: T.
        pivots: S.
        position: Place of each output.
        first: Output at which all pivots begin, from :func:`first_of_pivots`; None to go by ``position``.
        plain: Whether products may be written into given memory: not under autocast, nor where gradients are asked for,
            nor in a traced graph.
    """
    in_bf16 = plain and x.dtype is torch.bfloat16 and x.device.type == "cpu"
    if in_bf16 and first is None:
        if len(x) < _TURNED:
            return _joined(x, others, pivots, 0, len(position)).float().index_select(1, position).to(x.dtype)
        if _are_rows_sooner_in_order(len(x), len(pivots), len(position)):
            return _rows_in_order(x, others, pivots, position)
        return _in_columns(x, others, pivots, position)
    if in_bf16 and _has_matrix_units() and len(x) >= _MANY:
        return _in_whole_registers(x, others, pivots, len(position), first or 0)
    if plain and not in_bf16 and len(x) >= _FEW:
        return _in_tiles(x, others, pivots, position, first)
    y = _joined(x, others, pivots, first or 0, len(position))
    return y if first is not None else y.index_select(1, position)


def joined(known: Tensor, mixed: Tensor, first: int, outputs: int) -> list[Tensor]:
    """The pieces that outputs consist of: pivots ``known`` behind the first of the others, then zeros if any are left.

    Args:
        known: Shape (…, r).
        mixed: The other outputs, (…, others).
        first: How many of the others come before the pivots.
        outputs: How many outputs there are, those that are zero included; one zero is enough where they are gathered.
    """
    parts = [mixed[..., :first], known, mixed[..., first:]] if first else [known, mixed]
    zeros = outputs - known.shape[-1] - mixed.shape[-1]
    return [*parts, known.new_zeros(1).expand(*known.shape[:-1], zeros)] if zeros else parts


def _joined(x: Tensor, others: Tensor, pivots: Tensor, first: int, outputs: int) -> Tensor:
    known = F.linear(x, pivots)
    return torch.cat(joined(known, F.linear(known, others), first, outputs), dim=1)


def _rows_in_order(x: Tensor, others: Tensor, pivots: Tensor, position: Tensor) -> Tensor:
    """``U (S x)`` with ``U = [I; T]`` whose rows are those of the outputs, (out, r), r padded to whole registers."""
    rank, width, made = len(pivots), len(pivots) + -len(pivots) % _ALIGNED, len(pivots) + len(others)
    table = _SPACE.of("table", x, made + (len(position) > made), width).zero_()
    table[:rank].fill_diagonal_(1)
    table[rank:made, :rank] = others
    rows = torch.index_select(table, 0, position, out=_SPACE.of("rows", x, len(position), width))
    return F.linear(F.linear(x, _padded("pivots", pivots, width, pivots.shape[1])), rows)


def _in_columns(x: Tensor, others: Tensor, pivots: Tensor, position: Tensor) -> Tensor:
    """Outputs as rows of all vectors, or of a tile of them, put in order as such, then turned."""
    if len(x) <= _TILE:
        return _ordered_rows(x, others, pivots, position).T.contiguous()
    y = x.new_empty(len(x), len(position))
    for start in range(0, len(x), _TILE):
        y[start : start + _TILE] = _ordered_rows(x[start : start + _TILE], others, pivots, position).T
    return y


def _ordered_rows(x: Tensor, others: Tensor, pivots: Tensor, position: Tensor) -> Tensor:
    """``[I; T] S xᵀ`` in the outputs' own order, (out, tokens); to be read before the next call."""
    rank, made, zeros = len(pivots), len(pivots) + len(others), int(len(position) > len(pivots) + len(others))
    if len(x) < _FEW:
        known = torch.mm(pivots, x.T)
        parts = [known, torch.mm(others, known), known.new_zeros(zeros, len(x))]
        return torch.cat(parts).index_select(0, position)
    rows = _SPACE.of("outputs", x, made + zeros, len(x))
    torch.mm(pivots, x.T, out=rows[:rank])
    torch.mm(others, rows[:rank], out=rows[rank:made])
    rows[made:] = 0
    return torch.index_select(rows, 0, position, out=_SPACE.of("rows", x, len(position), len(x)))


def _in_tiles(x: Tensor, others: Tensor, pivots: Tensor, position: Tensor, first: int | None) -> Tensor:
    """Outputs in tiles of tokens, which stay in the processor's cache until they are in their places."""
    rank, made = len(pivots), len(pivots) + len(others)
    y = x.new_empty(len(x), len(position))
    tile = min(len(x), _TILE) if x.device.type == "cpu" else len(x)
    # With a zero behind, where outputs are zero.
    space = _SPACE.of("outputs", x, tile, min(made + 1, len(position)))
    if made < len(position):
        space[:, -1] = 0
    for start in range(0, len(x), tile):
        part = x[start : start + tile]
        outputs = space[: len(part)]
        known, mixed = outputs[:, :rank], outputs[:, rank:made]
        torch.mm(part, pivots.T, out=known)
        torch.mm(known, others.T, out=mixed)
        if first is None:
            torch.index_select(outputs, -1, position, out=y[start : start + tile])
        else:
            torch.cat(joined(known, mixed, first, len(position)), dim=1, out=y[start : start + tile])
    return y


def _in_whole_registers(x: Tensor, others: Tensor, pivots: Tensor, outputs: int, first: int) -> Tensor:
    """Outputs whose pivots come one behind the other, the rank filled up with zeros to whole registers."""
    rank, width = len(pivots), len(pivots) + -len(pivots) % _ALIGNED
    known = F.linear(x, _padded("pivots", pivots, width, pivots.shape[1]))
    space = _SPACE.of("outputs", x, len(x), len(others))
    mixed = torch.mm(known, _padded("others", others, len(others), width).T, out=space)
    return torch.cat(joined(known[:, :rank], mixed, first, outputs), dim=1)


def _padded(name: str, matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix with zeros below it and to its right; itself if it has that size."""
    if matrix.shape == (rows, columns):
        return matrix
    space = _SPACE.of(name, matrix, rows, columns)
    space[: len(matrix), : matrix.shape[1]] = matrix
    space[len(matrix) :] = 0
    space[:, matrix.shape[1] :] = 0
    return space


def _are_rows_sooner_in_order(tokens: int, rank: int, outputs: int) -> bool:
    """Whether r² multiply–adds a token, and the ordering of rows, take less time than the turning of outputs."""
    if _has_matrix_units():
        return tokens * _LEAST_SHARE >= rank
    return tokens >= _TILE and rank * rank < _TURNING * outputs


@cache
def _has_matrix_units() -> bool:
    """Whether the processor multiplies tiles in bf16 (AMX); False where torch, before 2.10, cannot tell."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16", False))


class _Space(threading.local):
    """Memory for what lives within one call: taking fresh pages for it would take longer than filling it."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, torch.dtype], Tensor] = {}

    def of(self, name: str, like: Tensor, rows: int, columns: int) -> Tensor:
        """A tensor (rows, columns) of any values, of the dtype and device of ``like``."""
        numbers = rows * columns
        if like.device.type != "cpu" or numbers > _MOST_HELD:
            return like.new_empty(rows, columns)
        held = self.held.get((name, like.dtype))
        if held is None or len(held) < numbers:
            with torch.inference_mode(False):  # so that it can be written in any mode
                held = torch.empty(numbers, dtype=like.dtype)
            self.held[name, like.dtype] = held
        return held[:numbers].view(rows, columns)


_SPACE = _Space()
