"""The search for the contraction path that applies an operator to a number of tokens in the least estimated time.

The order in which the state's axes lie in memory decides which products need no copy, so the search runs over memory
layouts as well as over orders of sites. One step with all sites is the matrix itself, multiplied out in the forward.
Notation: see :mod:`tensorfold.algebra.contraction.paths`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise, permutations, product
from typing import Any

from tensorfold.algebra.contraction import forms
from tensorfold.algebra.contraction.costs import Machine, core_shape, merging
from tensorfold.algebra.contraction.paths import Chain, ContractionPath, Form, Order, Step, cheapest_order
from tensorfold.errors import InputError

# Most numbers of a core that is multiplied together within a forward, 64 MiB in float32: a vocabulary's table is built
# only where every other path would hold more than the table and a dense layer's activations.
LARGEST_BUILT = 2**24

# Rows whose length is a multiple of this are read by whole vector registers, which saves this part of a product's time.
_ALIGNED = 8
_ALIGNMENT_GAIN = 0.1

# Numbers of rows multiplied at once by a small core, and the longest that rows of such a product may become.
_BLOCKS = (4, 8)
_WIDEST_BLOCK = 128

# States kept for each number of sites done, fastest first; specs of two or three sites have fewer.
_BEAM = 24

# Products of a transposed factor with two or three rows run at a third of the speed; a copy of so little is cheaper.
_SHORTEST_BATCHED = 4

# An axis of the state: ("n", site) is an input mode not read yet, ("m", site) an output mode, ("r", bond) an open bond.
Axis = tuple[str, int]


@lru_cache(maxsize=4096)
def fastest_path(
    spec: Chain,
    tokens: int,
    training: bool = False,
    machine: Machine | None = None,
    force: Order | str | None = None,
) -> ContractionPath:
    """Contraction path that applies an operator to a number of vectors in the least estimated time.

    In training a path costs its backward pass as well, and one that keeps more numbers for it than a dense layer does
    (input, output and weight together) is not taken unless nothing else is left. Equal arguments give equal paths, in
    every process.

    Args:
        spec: Shape of the operator.
        tokens: Number of vectors.
        training: Whether gradients will be asked for.
        machine: Speeds that times are estimated by; the built-in ones of one processor core if None.
        force: An order of single sites, ``"chain"`` for the one with the fewest multiply–adds, or ``"materialise"``;
            then only the layout in memory is chosen.

    Raises:
        InputError: ``force`` is none of these, or not an order of this spec's sites.
    """
    if force == "chain" or spec.has_pivot_rows:
        force = cheapest_order(spec.out_modes, spec.in_modes, spec.ranks)
    if isinstance(force, Order):
        left = force.moves.count("L")
        if force.start != left or left + force.moves.count("R") != spec.sites - 1 != len(force.moves):
            raise InputError(f"way: {force} does not visit the {spec.sites} sites of {spec} once each; correct it.")
    elif force not in (None, "materialise"):
        raise InputError(f'way: got {force!r}; needed None, "materialise", "chain" or an Order.')
    machine = machine or Machine()
    limit = tokens * (spec.in_features + spec.out_features) + spec.dense_parameters
    search = _Search(spec, tokens, training, machine, force)
    path = search.best(limit if training and force is None else math.inf) or search.best(math.inf)
    assert path is not None  # a chain of single sites can always be
    if path.kept > limit and force is None:
        path = _Search(spec, tokens, training, machine, force, math.inf).best(limit) or path
    dense = machine.product(tokens, spec.out_features, spec.in_features)
    if spec.has_pivot_rows:  # the product with its identity is not made
        path = replace(path, seconds=path.seconds * spec.macs / path.macs, macs=spec.macs)
    return replace(path, dense=dense * (3 if training else 1))


@dataclass(frozen=True)
class _State:
    """Partial path of the search.

    Attributes:
        a: First site that has been joined.
        b: Site behind the last one that has been joined.
        axes: Axes of the state as they lie in memory, those of size 1 left out.
        path: Steps so far, and their costs.
    """

    a: int
    b: int
    axes: tuple[Axis, ...]
    path: ContractionPath


class _Search:
    """Beam search over intervals of joined sites and memory layouts, for one spec, number of tokens and machine.

    ``largest`` bounds the numbers of a core that is multiplied together within a forward.
    """

    def __init__(
        self,
        spec: Chain,
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
            self.sizes["m", k], self.sizes["n", k] = m, n

    def best(self, limit: float) -> ContractionPath | None:
        """Fastest path that keeps at most ``limit`` numbers for the backward pass; None if there is none."""
        sites = self.spec.sites
        done: list[dict[Any, _State]] = [{} for _ in range(sites + 1)]
        done[0][None] = _State(0, 0, self._axes("n", 0, sites), ContractionPath(()))
        for count in range(sites):
            for state in sorted(done[count].values(), key=lambda state: state.path.seconds)[:_BEAM]:
                for new in self._moves(state, count):
                    key, there = (new.a, new.axes), done[new.b - new.a]
                    if new.path.kept <= limit and (key not in there or new.path.seconds < there[key].path.seconds):
                        there[key] = new
        finished = [self._finish(state) for state in done[sites].values()]
        return min(finished, key=lambda path: path.seconds, default=None)

    def _moves(self, state: _State, count: int) -> Iterator[_State]:
        """States after one step more, where ``count`` sites are joined already."""
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
        """States after every product that joins the sites [p, q).

        Args:
            state: Where the path is.
            p: First site to join.
            q: Site behind the last one to join.
            shape: Shape (left bond, out modes, in modes, right bond) of these sites multiplied together.
            bond: Axis of that core, 0 or 3, which is shared with the sites joined so far; None where there are none.
        """
        parts = (self._axes("r", p), self._axes("m", p, q), self._axes("n", p, q), self._axes("r", q))
        natural = tuple(k for k in range(4) if shape[k] > 1)
        consumed = [k for k in natural if k in (2, bond)]
        produced = [k for k in natural if k not in (2, bond)]
        a, b = (p, q) if bond is None else (min(p, state.a), max(q, state.b))
        merged = merging(self.spec, p, q, self.machine)
        for summed, made in product(permutations(consumed), permutations(produced)):
            transposed = summed + made == natural != made + summed
            wanted = summed + made if transposed else made + summed
            core_axes = None if wanted == natural else (*(k for k in range(4) if shape[k] == 1), *wanted)
            seconds, kept = merged.seconds * (3 if self.training else 1), merged.kept
            if core_axes is not None:
                seconds, kept = seconds + self._copy(math.prod(shape)), kept + math.prod(shape)
            path = state.path
            path = replace(path, seconds=path.seconds + seconds, kept=path.kept + kept, build=path.build + merged.macs)
            d, c = math.prod(shape[k] for k in made), math.prod(shape[k] for k in summed)
            base = Step(Form.ROWS, merged.tree, core_axes, transposed, d, c)
            old = tuple(axis for k in summed for axis in parts[k])
            new = tuple(axis for k in made for axis in parts[k])
            for step, axes in self._forms(state.axes, old, new, base):
                yield _State(a, b, axes, self._after(path, step))

    def _forms(
        self, axes: tuple[Axis, ...], old: tuple[Axis, ...], new: tuple[Axis, ...], base: Step
    ) -> Iterator[tuple[Step, tuple[Axis, ...]]]:
        """Products that contract the axes ``old`` of a state into ``new``, each with the order of axes that it leaves.

        Args:
            axes: The state's, as they lie in memory.
            old: Axes that the core sums over.
            new: Axes that the core makes.
            base: Step with everything but its form.
        """
        sizes = tuple(self.sizes[axis] for axis in axes)

        def step(form: str, front: tuple[Axis, ...], behind: tuple[Axis, ...] = ()) -> Step:
            return replace(base, form=form, left=self._numbers(front), right=self._numbers(behind), state=sizes)

        rest = tuple(axis for axis in axes if axis not in old)
        at_end = axes == rest + old
        if old or self.training:
            permutation = None if at_end else tuple(axes.index(axis) for axis in rest + old)
            yield replace(step(Form.ROWS, rest), permutation=permutation), rest + new
        if self.force is None:
            # One product with rows of 4 to 128 numbers runs many times as fast as one with rows of a few.
            for block in _BLOCKS:
                if self._numbers(rest) % block == 0 and block * max(base.c, base.d) <= _WIDEST_BLOCK and at_end:
                    yield replace(step(Form.ROWS, rest), block=block), rest + new
        if not old:
            for k in range(len(axes) + 1):
                yield step(Form.OUTER, axes[:k], axes[k:]), axes[:k] + new + axes[k:]
        # In training a product that shares its core over a batch has, for each of the batch, a gradient of the core.
        elif not self.training and at_end and rest:
            yield step(Form.FRONT, rest), new + rest
        elif not self.training and not at_end:
            k = axes.index(old[0])
            front, behind = axes[:k], axes[k + len(old) :]
            if front + old + behind == axes:
                yield step(Form.LEFT, front, behind), front + new + behind
                if self._numbers(behind) >= _SHORTEST_BATCHED:
                    yield step(Form.RIGHT, front, behind), front + behind + new

    def _after(self, path: ContractionPath, step: Step) -> ContractionPath:
        """Path with one step more, its costs added."""
        read = self.tokens * step.left * step.right * step.c
        made = step.block**2 * (step.c * step.d + 1) if step.block > 1 else 0  # I ⊗ core, and I
        seconds = forms.seconds(self.machine, step, self.tokens) * (3 if self.training else 1)
        return replace(
            path,
            steps=(*path.steps, step),
            seconds=path.seconds + seconds + (self._copy(read) if step.permutation else 0.0),
            macs=path.macs + step.left * step.right * step.c * step.d * step.block,
            kept=path.kept + (read if path.steps or step.permutation else 0) + made,
        )

    def _finish(self, state: _State) -> ContractionPath:
        """Path of a state that has joined all sites, with the permutation that brings its outputs into their order."""
        wanted = self._axes("m", 0, self.spec.sites)
        path = self._aligned(state.path)
        last = path.steps[-1]
        outputs = self.tokens * math.prod(self.spec.out_modes)
        seconds, permutation = 0.0, None
        if state.axes != wanted:
            permutation = tuple(state.axes.index(axis) for axis in wanted)
            seconds += self._copy(outputs)
        if permutation is not None or last.form != Form.ROWS or last.left > 1:  # the bias needs a pass of its own
            seconds += self.machine.call + outputs / self.machine.numbers
        sizes = tuple(self.sizes[axis] for axis in state.axes)
        return replace(path, outputs=sizes, permutation=permutation, seconds=path.seconds + seconds)

    def _aligned(self, path: ContractionPath) -> ContractionPath:
        """Path with bonds padded to multiples of ``_ALIGNED`` where a whole state goes from product to product.

        A low-rank layer of rank 335 takes a quarter longer than one of rank 336 when it has many tokens to work on, and
        loses a little by the padding when it has few.
        """
        steps = list(path.steps)
        for k, (one, two) in enumerate(pairwise(steps)):
            more = -one.d % _ALIGNED
            if not more or one.block * two.block > 1:
                continue
            if (one.form, two.form, two.permutation, two.c, two.left) != (Form.ROWS, Form.ROWS, None, one.d, one.left):
                continue
            saved = _ALIGNMENT_GAIN * self.tokens * one.left * one.d * (one.c + two.d) / self.machine.macs
            padded = 2 * self.machine.call + 4 * one.d * (one.c + two.d) / self.machine.numbers
            if padded < saved * (3 if self.training else 1):
                steps[k] = replace(steps[k], more_d=more)
                steps[k + 1] = replace(two, more_c=more)
        return replace(path, steps=tuple(steps))

    def _copy(self, numbers: float) -> float:
        """Seconds of a copy into another order of axes, and of its gradient's in training."""
        return self.machine.copy(numbers) * (2 if self.training else 1)

    def _axes(self, kind: str, p: int, q: int | None = None) -> tuple[Axis, ...]:
        """Axes of one kind for site (or bond) p, or for sites [p, q), those of size 1 left out."""
        sites = range(p, p + 1 if q is None else q)
        return tuple((kind, k) for k in sites if self.sizes[kind, k] > 1)

    def _numbers(self, axes: tuple[Axis, ...]) -> int:
        """Product of the sizes of some axes."""
        return math.prod(self.sizes[axis] for axis in axes)
