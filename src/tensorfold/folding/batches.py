"""Batches of matrices that are folded together, and what calibration text says of each before it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tensorfold.algebra.precision import solvable
from tensorfold.algebra.solvers.fewer_units import KeptUnits
from tensorfold.algebra.statistics import Statistics
from tensorfold.calibration.block_stream import Allocate, BlockStream, check_called, inputs_of
from tensorfold.calibration.error_feedback import Reference
from tensorfold.calibration.expert_moments import shrunk_experts
from tensorfold.calibration.gradients import gradient_moments
from tensorfold.folding.found import Found
from tensorfold.folding.plan import Plan
from tensorfold.folding.refine import Refinement, refine_block
from tensorfold.folding.text import Text
from tensorfold.hf.modules import scale_of
from tensorfold.hf.surgery import hidden_units
from tensorfold.methods.base import NOTHING
from tensorfold.models.anatomy import Matrix, by_block, dense_weight, matrices


@dataclass(frozen=True, eq=False)
class Batch:
    """Matrices that do not depend on each other, and are therefore folded together.

    Attributes:
        matrices: Their names are the keys of what :meth:`measure` returns.
    """

    matrices: list[Matrix]

    def measure(self) -> dict[str, Statistics]:
        """What the text says of each, through the model as it is now; matrices of which it says nothing are absent."""
        return {}

    def refine(self) -> Refinement | None:
        """Improve what the matrices are part of, once all are folded; None where there is nothing to improve."""
        return None


def batches(
    model: PreTrainedModel,
    chosen: Mapping[str, Matrix],
    planned: Plan,
    text: Text,
    found: Found,
    allocate: Allocate | None = None,
) -> Iterator[Batch]:
    """Every chosen matrix once: all of them in one batch if there is no text.

    Else embeddings and then block by block; the caller folds each batch before the next one is asked for, so that a
    block is measured on what the folded blocks before it pass on. Blocks with layers that share a budget come in parts,
    in the order in which they are applied, where their effort asks for it; an MLP whose hidden units are reordered is
    never divided, since its matrices follow one order.

    Args:
        allocate: Makes the tensors for the states between blocks; on the model's device if None.
    """
    windows = text.windows
    if windows is None:
        yield Batch(list(chosen.values()))
        return
    tables = [matrix for matrix in chosen.values() if matrix.kind == "embedding"]
    linears = {name: matrix for name, matrix in chosen.items() if matrix.kind == "linear"}
    effort = [found.efforts[name] for name in linears if name in found.efforts]
    # Made before anything is folded: it keeps the dense modules.
    reference = Reference(model, windows, linears, allocate) if any(each.feedback for each in effort) else None
    if tables:
        yield Tables(tables, model, planned, text)
    if not linears:
        return
    stream = BlockStream(model, windows, allocate)
    inside = by_block(linears, stream.name)
    together = _reordered_together(model, planned)
    for index in range(max(inside, default=-1) + 1):
        block = inside.get(index, {})
        stages = [list(block)] if block else []
        if any(each.staged for each in effort) and block:
            stages = stream.stages(index, {name: matrix.module for name, matrix in block.items()})
            stages = _undivided(stages, [*together, *_same_layer(block)])
        for stage in stages:
            yield Stage([block[name] for name in stage], stream, index, stage is stages[-1], reference, found)
        if index < max(inside):
            with stream.rounded(reference is not None):  # as the reference's, which it is compared with
                stream.advance(index)
    placed = {name for block in inside.values() for name in block}
    outside = [matrix for name, matrix in linears.items() if name not in placed]
    if outside:
        yield Outside(outside, stream)


def _reordered_together(model: PreTrainedModel, planned: Plan) -> list[set[str]]:
    """Names of the matrices of every MLP whose hidden units are reordered."""
    families = [[matrix.name for matrix in (*units.ups, units.down)] for units in hidden_units(model, matrices(model))]
    reordered = {name for name, method in planned.methods.items() if method.reorders_hidden}
    return [set(family) for family in families if reordered & set(family)]


def _same_layer(block: Mapping[str, Matrix]) -> list[set[str]]:
    """Names of the experts of every tensor: they are given different tokens of the same states."""
    families: dict[str, set[str]] = {}
    for name, matrix in block.items():
        if matrix.group == "experts":
            families.setdefault(name.rpartition(".")[0], set()).add(name)
    return list(families.values())


def _undivided(stages: list[list[str]], families: list[set[str]]) -> list[list[str]]:
    """The stages, each family in the first one that has any of it."""
    stages = [list(stage) for stage in stages]
    for family in families:
        first = next((stage for stage in stages if family & set(stage)), None)
        if first is not None:
            late = [name for stage in stages if stage is not first for name in stage if name in family]
            first += late
            stages = [stage if stage is first else [n for n in stage if n not in late] for stage in stages]
    return [stage for stage in stages if stage]


@dataclass(frozen=True, eq=False)
class Stage(Batch):
    """Layers of one block that are given their inputs at the same time.

    Attributes:
        stream: The folded model's states, at the entrance of block ``index``.
        last: Whether no other layer of the block is folded after these.
        reference: The dense model beside it, where layers are fitted to its output.
        found: What a search knows of layers that share a budget.
        tokens: How many vectors each layer was given when it was measured.
    """

    stream: BlockStream
    index: int
    last: bool
    reference: Reference | None
    found: Found
    tokens: dict[str, int] = field(default_factory=dict)

    def measure(self) -> dict[str, Statistics]:
        """Moments of all, and for those that share a budget feedback, gradients, starts and bases of value heads."""
        known = self._plain()
        if self.reference is not None and any(matrix.name in self.found.efforts for matrix in self.matrices):
            known |= self._corrected(self.reference)
        known = self._joined(self._with_few_tokens(known))
        return {name: self.found.completed(self._matrix(name), each) for name, each in known.items()}

    def _joined(self, known: dict[str, Statistics]) -> dict[str, Statistics]:
        """The statistics, those of experts that one matrix holds put together."""
        for matrix in self.matrices:
            own = [known.pop(part.name, NOTHING).input_moment for part in matrix.parts] if matrix.experts else []
            met = [moment for moment in own if moment is not None]
            if len(met) < len(own) or not met:
                continue
            counts = torch.tensor([self.tokens.get(part.name, 0) for part in matrix.parts], dtype=torch.float64)
            shares = (counts / counts.sum()).to(met[0].device)
            pooled = torch.zeros_like(met[0])
            for share, moment in zip(shares.tolist(), met, strict=True):
                pooled.add_(moment, alpha=share)
            known[matrix.name] = Statistics(pooled, expert_moments=torch.stack(met), expert_shares=shares)
        return known

    def _with_few_tokens(self, known: dict[str, Statistics]) -> dict[str, Statistics]:
        """The statistics with the moments of experts shrunk towards what their layer says."""
        moments = {name: each.input_moment for name, each in known.items() if each.input_moment is not None}
        parts = [part for matrix in self.matrices for part in matrix.parts]
        shrunk = shrunk_experts(moments, self.tokens, parts, self.stream.width)
        return {name: replace(known.get(name, NOTHING), input_moment=moment) for name, moment in shrunk.items()} | {
            name: each for name, each in known.items() if name not in shrunk
        }

    def refine(self) -> Refinement | None:
        """Step the block towards the dense model's output, where an effort asks for it and all of it is folded."""
        steps = max(
            (self.found.efforts[m.name].refine for m in self.matrices if m.name in self.found.efforts), default=0
        )
        if not (steps and self.last and self.reference is not None):
            return None
        return refine_block(self.stream, self.index, self.reference, steps)

    def _matrix(self, name: str) -> Matrix:
        return next(matrix for matrix in self.matrices if matrix.name == name)

    def _plain(self) -> dict[str, Statistics]:
        """The input moments of layers that are fitted to the dense weight."""
        corrected = self.found.efforts if self.reference is not None else {}
        plain = [matrix for matrix in self.matrices if matrix.name not in corrected]
        modules = {part.name: part.module for matrix in plain for part in matrix.parts}
        if not modules:
            return {}
        needed = {m.name for m in self.matrices if m.name in modules and m.group != "experts"}
        moments = self.stream.input_moments(self.index, modules, False, self.tokens)
        check_called(needed, moments)
        return {name: Statistics(input_moment=moment) for name, moment in moments.items()}

    def _corrected(self, reference: Reference) -> dict[str, Statistics]:
        """Statistics of layers that are fitted to the dense model's output from what the folded model gives them."""
        layers = {matrix.name: matrix for matrix in self.matrices if matrix.name in self.found.efforts}
        turned = {name: turn for name, turn in self.found.turns.items() if name in layers and not turn.of_values}
        towards = {name: turn.weight(layers[name]) for name, turn in turned.items()}
        fewer = [name for name, turn in turned.items() if isinstance(turn.basis, KeptUnits)]
        ridge = {name: self.found.efforts[name].ridge for name in layers}
        found = reference.statistics(self.stream, self.index, layers, self.last, towards, fewer, ridge)
        self.tokens.update(reference.tokens)
        return found


@dataclass(frozen=True, eq=False)
class Outside(Batch):
    """Layers outside the blocks, such as a head that is not tied."""

    stream: BlockStream

    def measure(self) -> dict[str, Statistics]:
        """Input moments, from whole passes."""
        moments = self.stream.input_moments_outside({matrix.name: matrix.module for matrix in self.matrices})
        return {name: Statistics(input_moment=moment) for name, moment in moments.items()}


@dataclass(frozen=True, eq=False)
class Tables(Batch):
    """Embedding tables."""

    model: PreTrainedModel
    planned: Plan
    text: Text

    def measure(self) -> dict[str, Statistics]:
        """For the input table: counts of its tokens, the loss's gradients behind it, and what a tied head reads."""
        table = next((matrix for matrix in self.matrices if matrix.group == "embedding"), None)
        counts, windows = self.text.counts, self.text.windows
        if table is None or counts is None or windows is None:
            return {}
        if not self.planned.methods[table.name].fits_text:
            return {table.name: Statistics(counts=counts)}
        moments = gradient_moments(self.model, windows, {table.name: table.module}, len(self.text.prefix))
        gradients = moments[table.name].full(scale_of(table) ** 2)  # rows are scaled on their way in, as Gemma does
        if table.tied_head is None:
            return {table.name: Statistics(gradient_moment=gradients, counts=counts)}
        states = solvable(self._states(table, windows))
        scale = _scale_of_logits(self.model, table, windows, states)
        states = states if scale is None else states * scale
        moment = states.T @ states / len(states)  # (width, width)
        reads = scale is not None and self.planned.methods[table.name].reads_states
        return {table.name: Statistics(moment, gradients, counts, states if reads else None)}

    def _states(self, table: Matrix, windows: Tensor) -> Tensor:
        """What the tied head reads, shape (tokens, width)."""

        def forward() -> None:
            for window in windows.to(table.parameter.device).split(1):
                self.model(window, use_cache=False)

        return inputs_of(forward, self.model.get_submodule(table.tied_head or ""), self.model)


def _scale_of_logits(model: PreTrainedModel, table: Matrix, windows: Tensor, states: Tensor) -> float | None:
    """a where the model's logits are ``a · E h`` (Cohere, Granite); None where they are biased or capped (Gemma 2).

    The first tokens decide; ``states`` begin with theirs, and no later token changes them.
    """
    few = windows[:1, :16].to(table.parameter.device)
    logits = model(few, use_cache=False).logits[0].float()
    products = states[: len(logits)].to(few.device) @ dense_weight(table.module).float().T
    scale = float((logits * products).sum() / products.square().sum().clamp_min(torch.finfo(torch.float32).tiny))
    return scale if (logits - scale * products).norm() <= 1e-2 * logits.norm() else None
