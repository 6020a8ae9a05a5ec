"""Estimated seconds of a matrix product, a copy and the multiplying together of cores on a machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tensorfold.algebra.contraction.paths import Chain

# Sums of fewer numbers, one after the other, are no faster than a copy into another order.
_SHORTEST_SUM = 16


@dataclass(frozen=True)
class Machine:
    """Speeds of a machine; the defaults are one core of a server processor in float32. Only ratios matter to a choice.

    Attributes:
        macs: Multiply–adds a second of a large product.
        numbers: Numbers read or written a second, one after the other.
        permuted: Numbers a second of a copy into another order of axes.
        call: Seconds of calling an operation.
        rows: Rows that a product (M, K) · (K, N) pays for on top of M: ``(M + rows)(N + columns)(K + depth)``
            multiply–adds in all (Hockney's half-performance length).
        columns: Likewise for N.
        depth: Likewise for K.
        cached: Numbers that can be written at once without fresh pages of memory.
        fresh: Numbers a second that fresh pages are taken for.
    """

    macs: float = 4.7e10
    numbers: float = 1.2e10
    permuted: float = 1.3e9
    call: float = 4e-6
    rows: float = 7.0
    columns: float = 10.0
    depth: float = 6.0
    cached: float = 8e6
    fresh: float = 2.5e8

    def product(self, rows: float, columns: float, depth: float, batch: int = 0) -> float:
        """Seconds of one product (rows, depth) · (depth, columns), or of a ``batch`` of those that share one factor."""
        calls, batch = (2, batch) if batch else (1, 1)  # a batched product has more to arrange
        paid = (rows + self.rows) * (columns + self.columns) * (depth + self.depth) / self.macs
        if 1 in (rows, columns):  # a matrix and a vector: as fast as the matrix is read
            paid = rows * columns * depth / self.macs
        written = batch * rows * columns
        moved = (rows * depth * batch + depth * columns + written) / self.numbers
        if columns == 1 and depth < _SHORTEST_SUM:
            moved = max(moved, rows * depth * batch / self.permuted)
        return calls * self.call + max(batch * paid, moved) + self.pages(written)

    def copy(self, numbers: float) -> float:
        """Seconds of bringing the axes of a tensor into another order."""
        return self.call + numbers / self.permuted + self.pages(numbers)

    def spread(self, numbers: float, run: int) -> float:
        """Seconds of multiplying one number into each of ``numbers``, written in runs of ``run``."""
        return self.copy(numbers) if run < 16 else self.call + numbers / self.numbers + self.pages(numbers)

    def pages(self, numbers: float) -> float:
        """Seconds on top of writing ``numbers`` at once, where the allocator takes fresh pages for them."""
        return max(numbers - self.cached, 0.0) / self.fresh


# A server GPU in float32: far more arithmetic to hide a call behind, and memory that its allocator keeps.
_GPU = Machine(macs=1e13, numbers=3e11, permuted=1.5e11, call=1e-5, rows=64, columns=64, depth=32, cached=math.inf)


def default_machine(device_type: str) -> Machine:
    """Built-in speeds for a type of device: ``"cpu"``, or any accelerator."""
    return Machine() if device_type in ("cpu", "meta") else _GPU


def core_shape(spec: Chain, p: int, q: int) -> tuple[int, int, int, int]:
    """Shape of the core of sites [p, q) multiplied together: (left bond, out modes, in modes, right bond)."""
    bonds = (1, *spec.ranks, 1)
    return bonds[p], math.prod(spec.out_modes[p:q]), math.prod(spec.in_modes[p:q]), bonds[q]


@dataclass(frozen=True)
class Merging:
    """Way of multiplying the cores of neighbouring sites together.

    Attributes:
        tree: A site's number, or a pair of trees: which neighbours are multiplied together first.
        seconds: Estimated time.
        macs: Multiply–adds.
        kept: Numbers of all cores made on the way, the result included.
    """

    tree: Any
    seconds: float
    macs: int
    kept: int


@lru_cache(maxsize=4096)
def merging(spec: Chain, p: int, q: int, machine: Machine) -> Merging:
    """Cheapest way of multiplying the cores of sites [p, q) together, by dynamic programming over where it splits."""
    if q - p == 1:
        return Merging(p, 0.0, 0, 0)
    made = math.prod(core_shape(spec, p, q))
    options = []
    for s in range(p + 1, q):
        left, right = merging(spec, p, s, machine), merging(spec, s, q, machine)
        (r, m1, n1, bond), (_, m2, n2, t) = core_shape(spec, p, s), core_shape(spec, s, q)
        if bond == 1:
            seconds = machine.copy(made)
        else:
            k = blocking((r, m1, n1, bond), (bond, m2, n2, t))
            seconds = machine.product(r * m1 * n1 // k, m2 * n2 * t * k, bond * k)
            seconds += machine.copy(made) if n1 > 1 and m2 > 1 else 0.0
        options.append(
            Merging(
                (left.tree, right.tree),
                left.seconds + right.seconds + seconds,
                left.macs + right.macs + made * bond,
                left.kept + right.kept + made,
            )
        )
    return min(options, key=lambda option: option.seconds)


def blocking(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Number k of the left core's inputs taken together when it is multiplied by a small right core G: 4 or 1.

    A product with few summands and few columns is far from the speed of a large one. As ``G ⊗ I₄`` the right core makes
    four times the multiply–adds and takes less time.

    Args:
        left: Shape (r, m1, n1, bond).
        right: Shape (bond, m2, n2, t).
    """
    (r, m1, n1, _), (_, m2, n2, t) = left, right
    return 4 if n1 % 4 == 0 and m2 * n2 * t <= 16 and r * m1 * n1 * m2 * n2 * t >= 2**16 else 1
