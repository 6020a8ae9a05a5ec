"""The ways to contract an operator, and the choice among them by cost.

A way is a chain of steps. Each step joins one more site, or a run of neighbouring sites multiplied together first, to
the interval of sites done so far, and is one matrix product. The state between two steps is a tensor of the axes not
yet read ``j``, the outputs so far ``i`` and the open bonds ``r``; in which order they lie in memory decides which
products need no copy, so the search runs over memory layouts as well as over orders of sites. All sites at once is the
materialised matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise, permutations, product
from typing import Any

from tensorfold.algebra.cost import Machine, core_shape, merging
from tensorfold.algebra.spec import Spec
from tensorfold.errors import InputError

# Numbers a core multiplied together within a forward may have, 64 MiB in float32: a vocabulary's table is built only
# where every other way would hold more than the table and a dense layer's activations.
LARGEST_BUILT = 2**24

# Rows of this many numbers are read by whole vectors, and the part of a product's time that this saves.
_ALIGNED = 8
_ALIGNMENT_GAIN = 0.1

# Rows multiplied at once by a small core, and how long the rows of such a product may become.
_BLOCKS = (4, 8)
_WIDEST_BLOCK = 128

# Layouts kept for each number of sites done; specs of two or three sites have fewer.
_BEAM = 24

# Products of a turned factor with two or three rows run at a third of the speed; a copy of so little is cheaper.
_SHORTEST_BATCHED = 4

Axis = tuple[str, int]  # ("j" | "i" | "r", site or bond)


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


@dataclass(frozen=True)
class Step:
    """One product: the state, its axes in some order, with a core seen as a matrix ``(produced d, consumed c)``.

    ``tree`` is a site, or a pair of trees to be multiplied together first. The core's four axes in the order ``core``
    (None: their own) are ``(d, c)``, or ``(c, d)`` where ``turned``. ``state`` are the sizes of the state's axes a
    token, ``order`` the permutation that a copy brings them into before the product, None where none is needed. By
    ``form``, with ``left`` and ``right`` the numbers of the axes before and behind the consumed ones:

    - ``"rows"``: (tokens·left, c) → (tokens·left, d), one product; of ``block`` rows at a time, by ``I ⊗ core``
    - ``"left"``: (tokens·left, c, right) → (tokens·left, d, right)
    - ``"right"``: (tokens·left, c, right) → (tokens·left, right, d)
    - ``"front"``: (tokens, left, c) → (tokens, d, left)
    - ``"outer"``: (tokens·left, 1, right) → (tokens·left, d, right), nothing summed

    ``more_d`` and ``more_c`` are zero rows and columns appended to the core, so that a state between two products has
    rows of a length that vector units like.
    """

    form: str
    tree: Any
    core: tuple[int, ...] | None
    turned: bool
    d: int
    c: int
    left: int = 1
    right: int = 1
    state: tuple[int, ...] = ()
    order: tuple[int, ...] | None = None
    block: int = 1
    more_d: int = 0
    more_c: int = 0


@dataclass(frozen=True)
class Way:
    """Steps that apply an operator, and the final permutation of a token's outputs where one is needed.

    ``seconds`` is the estimate that the choice was made by, for the number of tokens asked for, and ``dense`` that of a
    dense layer of the same size; ``macs`` are the multiply–adds a token of the steps, without ``build``, those of the
    cores multiplied together first; ``kept`` is how many numbers the backward pass needs besides input and parameters.
    """

    steps: tuple[Step, ...]
    outputs: tuple[int, ...] = ()
    order: tuple[int, ...] | None = None
    seconds: float = 0.0
    dense: float = 0.0
    macs: int = 0
    build: int = 0
    kept: int = 0

    @property
    def materialises(self) -> bool:
        """Whether the matrix is built and applied as a dense layer's."""
        return len(self.steps) == 1

    def __str__(self) -> str:
        if self.materialises:
            return "materialise"
        return "→".join("·".join(map(str, leaves(step.tree))) for step in self.steps)


def leaves(tree: Any) -> tuple[int, ...]:
    """The sites of a tree of pairs, from left to right."""
    return (tree,) if isinstance(tree, int) else leaves(tree[0]) + leaves(tree[1])


@lru_cache(maxsize=4096)
def choose(
    spec: Spec,
    tokens: int,
    training: bool = False,
    machine: Machine | None = None,
    force: Order | str | None = None,
) -> Way:
    """The fastest way to apply ``spec`` to ``tokens`` vectors.

    In training a way costs its backward pass as well, and one that keeps more for it than a dense layer does (input,
    output and weight together) is not taken unless nothing else is left. Equal arguments give equal ways, in every
    process.

    Args:
        training: Whether gradients will be asked for.
        machine: Its speeds; the built-in ones of one processor core if None.
        force: An order of single sites, ``"chain"`` for the one with the fewest multiply–adds, or ``"materialise"``;
            then only the layout in memory is chosen.

    Raises:
        InputError: ``force`` is none of these, or not an order of this spec's sites.
    """
    if force == "chain" or spec.has_pivot_rows:
        force = cheapest_order(spec)
    if isinstance(force, Order):
        left = force.moves.count("L")
        if force.start != left or left + force.moves.count("R") != spec.sites - 1 != len(force.moves):
            raise InputError(f"way: {force} does not visit the {spec.sites} sites of {spec} once each; correct it.")
    elif force not in (None, "materialise"):
        raise InputError(f'way: got {force!r}; needed None, "materialise", "chain" or an Order.')
    machine = machine or Machine()
    limit = tokens * (spec.in_features + spec.out_features) + spec.dense_parameters
    search = _Search(spec, tokens, training, machine, force)
    way = search.best(limit if training and force is None else math.inf) or search.best(math.inf)
    assert way is not None  # a chain of single sites can always be
    if way.kept > limit and force is None:
        way = _Search(spec, tokens, training, machine, force, math.inf).best(limit) or way
    dense = machine.product(tokens, spec.out_features, spec.in_features)
    if spec.has_pivot_rows:  # the product with its identity is not made
        way = replace(way, seconds=way.seconds * spec.macs / way.macs, macs=spec.macs)
    return replace(way, dense=dense * (3 if training else 1))


@dataclass(frozen=True)
class _State:
    """A partial way: the interval of sites done, the order of axes in memory (those of size 1 left out)."""

    a: int
    b: int
    axes: tuple[Axis, ...]
    way: Way


class _Search:
    def __init__(
        self,
        spec: Spec,
        tokens: int,
        training: bool,
        machine: Machine,
        force: Order | str | None,
        largest: float = LARGEST_BUILT,
    ) -> None:
        self.spec, self.tokens, self.training, self.machine, self.force = spec, tokens, training, machine, force
        self.largest = largest
        self.bonds = (1, *spec.ranks, 1)
        self.sizes: dict[Axis, int] = {("r", k): bond for k, bond in enumerate(self.bonds)}
        for k, (m, n) in enumerate(zip(spec.out_modes, spec.in_modes, strict=True)):
            self.sizes["i", k], self.sizes["j", k] = m, n

    def best(self, limit: float) -> Way | None:
        """The fastest way that keeps at most ``limit`` numbers."""
        sites = self.spec.sites
        done: list[dict[Any, _State]] = [{} for _ in range(sites + 1)]
        done[0][None] = _State(0, 0, self._axes("j", 0, sites), Way(()))
        for count in range(sites):
            for state in sorted(done[count].values(), key=lambda state: state.way.seconds)[:_BEAM]:
                for new in self._moves(state, count):
                    key, there = (new.a, new.axes), done[new.b - new.a]
                    if new.way.kept <= limit and (key not in there or new.way.seconds < there[key].way.seconds):
                        there[key] = new
        finished = [self._finish(state) for state in done[sites].values()]
        return min(finished, key=lambda way: way.seconds, default=None)

    def _moves(self, state: _State, count: int) -> Iterator[_State]:
        sites, a, b = self.spec.sites, state.a, state.b
        if self.force == "materialise":
            intervals = [(0, sites)] if count == 0 else []
        elif isinstance(self.force, Order):
            start, moves = self.force.start, self.force.moves
            intervals = [(start, start + 1) if not count else (b, b + 1) if moves[count - 1] == "R" else (a - 1, a)]
        elif count == 0:
            intervals = [(p, q) for p in range(sites) for q in range(p + 1, sites + 1)]
        else:
            intervals = [(b, q) for q in range(b + 1, sites + 1)] + [(p, a) for p in range(a)]
        for p, q in intervals:
            shape = core_shape(self.spec, p, q)
            if q - p == 1 or self.force is not None or math.prod(shape) <= self.largest:
                yield from self._join(state, p, q, shape, bond=None if not count else 0 if p == b else 3)

    def _join(self, state: _State, p: int, q: int, shape: tuple[int, ...], bond: int | None) -> Iterator[_State]:
        """Every product that joins sites [p, q); ``bond`` is the core's axis shared with the sites done so far."""
        parts = (self._axes("r", p), self._axes("i", p, q), self._axes("j", p, q), self._axes("r", q))
        natural = tuple(k for k in range(4) if shape[k] > 1)
        consumed = [k for k in natural if k in (2, bond)]
        produced = [k for k in natural if k not in (2, bond)]
        a, b = (p, q) if bond is None else (min(p, state.a), max(q, state.b))
        merged = merging(self.spec, p, q, self.machine)
        for eaten, made in product(permutations(consumed), permutations(produced)):
            turned = eaten + made == natural != made + eaten
            wanted = eaten + made if turned else made + eaten
            core = None if wanted == natural else (*(k for k in range(4) if shape[k] == 1), *wanted)
            seconds, kept = merged.seconds * (3 if self.training else 1), merged.kept
            if core is not None:
                seconds, kept = seconds + self._copy(math.prod(shape)), kept + math.prod(shape)
            way = state.way
            way = replace(way, seconds=way.seconds + seconds, kept=way.kept + kept, build=way.build + merged.macs)
            d, c = math.prod(shape[k] for k in made), math.prod(shape[k] for k in eaten)
            base = Step("", merged.tree, core, turned, d, c)
            old = tuple(axis for k in eaten for axis in parts[k])
            new = tuple(axis for k in made for axis in parts[k])
            for step, axes in self._forms(state.axes, old, new, base):
                yield _State(a, b, axes, self._after(way, step))

    def _forms(
        self, axes: tuple[Axis, ...], old: tuple[Axis, ...], new: tuple[Axis, ...], base: Step
    ) -> Iterator[tuple[Step, tuple[Axis, ...]]]:
        """The products that contract the axes ``old`` into ``new``, and the order of axes that each leaves."""
        sizes = tuple(self.sizes[axis] for axis in axes)

        def step(form: str, front: tuple[Axis, ...], behind: tuple[Axis, ...] = (), order: Any = None) -> Step:
            left, right = self._numbers(front), self._numbers(behind)
            return replace(base, form=form, left=left, right=right, state=sizes, order=order)

        rest = tuple(axis for axis in axes if axis not in old)
        at_end = axes == rest + old
        if old or self.training:
            order = None if at_end else tuple(axes.index(axis) for axis in rest + old)
            yield step("rows", rest, order=order), rest + new
        if self.force is None:
            # One product with rows of 4 to 128 numbers runs many times as fast as one with rows of a few.
            for block in _BLOCKS:
                if self._numbers(rest) % block == 0 and block * max(base.c, base.d) <= _WIDEST_BLOCK and at_end:
                    yield replace(step("rows", rest), block=block), rest + new
        if not old:
            for k in range(len(axes) + 1):
                yield step("outer", axes[:k], axes[k:]), axes[:k] + new + axes[k:]
        # In training a product that shares its core over a batch has, for each of the batch, a gradient of the core.
        elif not self.training and at_end and rest:
            yield step("front", rest), new + rest
        elif not self.training and not at_end:
            k = axes.index(old[0])
            front, behind = axes[:k], axes[k + len(old) :]
            if front + old + behind == axes:
                yield step("left", front, behind), front + new + behind
                if self._numbers(behind) >= _SHORTEST_BATCHED:
                    yield step("right", front, behind), front + behind + new

    def _after(self, way: Way, step: Step) -> Way:
        """``way`` with one step more, and what it costs."""
        machine, tokens, left, right = self.machine, self.tokens, step.left, step.right
        read = tokens * left * right * step.c
        made = step.block**2 * (step.c * step.d + 1) if step.block > 1 else 0  # I ⊗ core, and I
        if step.form == "rows":
            seconds = machine.product(tokens * left / step.block, step.d * step.block, step.c * step.block)
            seconds += machine.call if step.block > 1 else 0.0
        elif step.form == "left":
            seconds = machine.product(step.d, right, step.c, tokens * left)
        elif step.form == "right":
            seconds = machine.product(right, step.d, step.c, tokens * left)
        elif step.form == "front":
            seconds = machine.product(left, step.d, step.c, tokens)
        else:
            seconds = machine.spread(read * step.d, right if right > 1 else step.d)
        return replace(
            way,
            steps=(*way.steps, step),
            seconds=way.seconds + seconds * (3 if self.training else 1) + (self._copy(read) if step.order else 0.0),
            macs=way.macs + left * right * step.c * step.d * step.block,
            kept=way.kept + (read if way.steps or step.order else 0) + made,
        )

    def _finish(self, state: _State) -> Way:
        wanted = self._axes("i", 0, self.spec.sites)
        way = self._aligned(state.way)
        last = way.steps[-1]
        outputs = self.tokens * math.prod(self.spec.out_modes)
        seconds, order = 0.0, None
        if state.axes != wanted:
            order = tuple(state.axes.index(axis) for axis in wanted)
            seconds += self._copy(outputs)
        if order is not None or last.form != "rows" or last.left > 1:  # the bias needs a pass of its own
            seconds += self.machine.call + outputs / self.machine.numbers
        sizes = tuple(self.sizes[axis] for axis in state.axes)
        return replace(way, outputs=sizes, order=order, seconds=way.seconds + seconds)

    def _aligned(self, way: Way) -> Way:
        """Bonds padded to a multiple of ``_ALIGNED`` where a whole state goes from one product to the next.

        A low-rank layer of rank 335 takes a quarter longer than one of rank 336 when it has many tokens to work on, and
        loses a little by the padding when it has few.
        """
        steps = list(way.steps)
        for k, (one, two) in enumerate(pairwise(steps)):
            more = -one.d % _ALIGNED
            if not more or one.block * two.block > 1:
                continue
            if (one.form, two.form, two.order, two.c, two.left) != ("rows", "rows", None, one.d, one.left):
                continue
            saved = _ALIGNMENT_GAIN * self.tokens * one.left * one.d * (one.c + two.d) / self.machine.macs
            padded = 2 * self.machine.call + 4 * one.d * (one.c + two.d) / self.machine.numbers
            if padded < saved * (3 if self.training else 1):
                steps[k] = replace(steps[k], more_d=more)
                steps[k + 1] = replace(two, more_c=more)
        return replace(way, steps=tuple(steps))

    def _copy(self, numbers: float) -> float:
        return self.machine.copy(numbers) * (2 if self.training else 1)

    def _axes(self, kind: str, p: int, q: int | None = None) -> tuple[Axis, ...]:
        sites = range(p, p + 1 if q is None else q)
        return tuple((kind, k) for k in sites if self.sizes[kind, k] > 1)

    def _numbers(self, axes: tuple[Axis, ...]) -> int:
        return math.prod(self.sizes[axis] for axis in axes)
