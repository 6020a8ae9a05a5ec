"""Contraction paths: which sites are joined in which order, and by which matrix product.

Notation, here and in the modules beside this one:

    t   tokens: vectors that the operator is applied to          L   sites
    m_k, n_k   output and input mode of site k                   r_k bond to the right of site k
    c   axes that a step sums over (consumed)                    d   axes that it makes (produced)
    l, r   axes of the state in front of, and behind, those summed over

A path takes the vectors through the sites. Its *state* is a tensor of a token's axes: input modes not read yet, output
modes made so far, and the open bonds. A *step* joins one more site, or a run of neighbouring sites multiplied together
before, and is one matrix product with a core seen as a matrix (d, c).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol


class Chain(Protocol):
    """Protocol of an operator's shape: sites and bonds of a chain, and size of the matrix that it makes."""

    def __hash__(self) -> int: ...
    @property
    def sites(self) -> int: ...
    @property
    def out_modes(self) -> tuple[int, ...]: ...
    @property
    def in_modes(self) -> tuple[int, ...]: ...
    @property
    def ranks(self) -> tuple[int, ...]: ...
    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def core_shapes(self) -> tuple[tuple[int, int, int, int], ...]: ...
    @property
    def dense_parameters(self) -> int: ...
    @property
    def macs(self) -> int: ...
    @property
    def has_pivot_rows(self) -> bool: ...


class Form:
    """Forms of a step's matrix product, each written as its einsum equation, operands (state, core).

    Plain strings, since torch.compile follows no members of an enum that a search returned.
    """

    ROWS = "tlc,dc->tld"  # one product with t·l rows
    LEFT = "tlcr,dc->tldr"  # t·l products (d, c) · (c, r)
    RIGHT = "tlcr,dc->tlrd"  # t·l products (r, c) · (c, d)
    FRONT = "tlc,dc->tdl"  # t products (d, c) · (c, l)
    OUTER = "tlr,dc->tldr"  # c is 1: nothing is summed


FORMS = (Form.ROWS, Form.LEFT, Form.RIGHT, Form.FRONT, Form.OUTER)


@dataclass(frozen=True)
class Order:
    """An order of contracting one site at a time.

    Attributes:
        start: The first site.
        moves: For every further site ``"L"`` or ``"R"``: the next one to the left or to the right of those joined.
        macs: Multiply–adds a token.
    """

    start: int
    moves: str
    macs: int


@lru_cache(maxsize=4096)
def cheapest_order(out_modes: tuple[int, ...], in_modes: tuple[int, ...], ranks: tuple[int, ...]) -> Order:
    """Order of joining single sites with the fewest multiply–adds a token, by O(L²) dynamic programming over intervals.

    Args:
        out_modes: m_k of the L sites.
        in_modes: n_k of the L sites.
        ranks: The L − 1 interior bonds r_k.
    """
    m, n, bonds = out_modes, in_modes, (1, *ranks, 1)
    sites = len(m)
    before = [math.prod(n[:k]) for k in range(sites + 1)]
    after = [math.prod(n[k:]) for k in range(sites + 1)]

    best = {
        (k, k + 1): Order(k, "", before[k] * bonds[k] * m[k] * n[k] * bonds[k + 1] * after[k + 1]) for k in range(sites)
    }
    for width in range(2, sites + 1):
        for a in range(sites - width + 1):
            b = a + width
            outputs = math.prod(m[a:b])
            # The last site joined is either the rightmost (move R) or the leftmost (move L) of the interval [a, b).
            last_right = before[a] * bonds[a] * outputs * bonds[b - 1] * n[b - 1] * bonds[b] * after[b]
            last_left = before[a] * bonds[a] * n[a] * bonds[a + 1] * outputs * bonds[b] * after[b]
            best[a, b] = min(
                Order(best[a, b - 1].start, best[a, b - 1].moves + "R", best[a, b - 1].macs + last_right),
                Order(best[a + 1, b].start, best[a + 1, b].moves + "L", best[a + 1, b].macs + last_left),
                key=lambda order: order.macs,
            )
    return best[0, sites]


@dataclass(frozen=True)
class Step:
    """One matrix product of the state with a core seen as a matrix (d, c).

    Attributes:
        form: Product, one of ``FORMS``.
        tree: Sites of the core: one site, or a pair of trees that are multiplied together first.
        core_axes: Order of the core's four axes (left bond, out, in, right bond) in which it is ``(d, c)``, or
            ``(c, d)`` where ``transposed``; None is their own.
        transposed: Whether the core lies in memory as ``(c, d)``.
        d: Size of the equation's axis d.
        c: Size of the equation's axis c.
        left: Size of the equation's axis l.
        right: Size of the equation's axis r.
        state: Sizes of the state's axes a token, before this step.
        permutation: Order of the state's axes that a copy brings them into before the product; None for no copy.
        block: Rows taken at once by a small core, as ``I_block ⊗ core``; above 1 only with ``Form.ROWS``.
        more_d: Zero rows appended to the core, so that a state between two products has rows of a length that vector
            units read fast.
        more_c: Zero columns appended to the core, which meet them.
    """

    form: str
    tree: Any
    core_axes: tuple[int, ...] | None
    transposed: bool
    d: int
    c: int
    left: int = 1
    right: int = 1
    state: tuple[int, ...] = ()
    permutation: tuple[int, ...] | None = None
    block: int = 1
    more_d: int = 0
    more_c: int = 0


@dataclass(frozen=True)
class ContractionPath:
    """Steps that apply an operator to vectors, and what they cost.

    Attributes:
        steps: Products, in the order in which they are taken.
        outputs: Sizes of the axes of a token's outputs as the last step leaves them.
        permutation: Order of these axes that makes them the output modes; None where they are in it.
        seconds: Estimated time that the path was chosen by, for the number of tokens asked for.
        dense: Estimated seconds of a dense layer of this size.
        macs: Multiply–adds a token, without ``build``.
        build: Multiply–adds of the cores that are multiplied together first, once a forward.
        kept: Numbers that the backward pass needs, besides input and parameters.
    """

    steps: tuple[Step, ...]
    outputs: tuple[int, ...] = ()
    permutation: tuple[int, ...] | None = None
    seconds: float = 0.0
    dense: float = 0.0
    macs: int = 0
    build: int = 0
    kept: int = 0

    @property
    def materialises(self) -> bool:
        """Whether the whole matrix is built in the forward and applied as a dense layer's."""
        return len(self.steps) == 1

    def __str__(self) -> str:
        if self.materialises:
            return "materialise"
        return "→".join("·".join(map(str, sites_of(step.tree))) for step in self.steps)


def sites_of(tree: Any) -> tuple[int, ...]:
    """Sites of a tree of pairs, from left to right."""
    return (tree,) if isinstance(tree, int) else sites_of(tree[0]) + sites_of(tree[1])
