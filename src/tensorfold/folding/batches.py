"""Batches of matrices that are folded together, and what calibration text says of each before it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tensorfold.algebra.statistics import Statistics
from tensorfold.calibration.block_stream import BlockStream, inputs_of
from tensorfold.calibration.error_feedback import Reference
from tensorfold.calibration.gradients import gradient_moments
from tensorfold.folding.plan import Plan
from tensorfold.folding.rank_search import Search
from tensorfold.hf.modules import scale_of
from tensorfold.models.anatomy import Matrix, blocks, by_block, dense_weight, matrices
from tensorfold.models.surgery import hidden_units


@dataclass(frozen=True)
class Text:
    """Calibration text as ``fold`` uses it: windows, shape (windows, length), and counts of tokens, (vocabulary,).

    ``prefix``: how many tokens at the beginning of every window are what the tokenizer puts before a document.
    """

    windows: Tensor | None = None
    counts: Tensor | None = None
    prefix: int = 0


def batches(
    model: PreTrainedModel, chosen: Mapping[str, Matrix], planned: Plan, text: Text, found: Search
) -> Iterator[tuple[list[Matrix], Callable[[], dict[str, Statistics]]]]:
    """Matrices that do not depend on each other, and what measures them on the text: all of them if there is no text.

    Else embeddings and then block by block; the caller folds each batch before the next one is asked for, so that a
    block is measured on what the folded blocks before it pass on. Blocks with layers that share a budget come in parts,
    in the order in which they are applied, where their effort asks for it; an MLP whose hidden units are reordered is
    never divided, since its matrices follow one order.
    """
    windows = text.windows
    if windows is None:
        yield list(chosen.values()), dict
        return
    embeddings = [matrix for matrix in chosen.values() if matrix.kind == "embedding"]
    linears = {name: matrix for name, matrix in chosen.items() if matrix.kind == "linear"}
    inside = by_block(linears, blocks(model)[0]) if linears else {}
    effort = [found.efforts[name] for name in linears if name in found.efforts]
    reference = Reference(model, windows, linears) if any(each.feedback for each in effort) else None
    families = [
        {matrix.name for matrix in (*units.ups, units.down)}
        for units in hidden_units(model, matrices(model))
        if any(planned.methods[m.name].reorders_hidden for m in (*units.ups, units.down) if m.name in planned.methods)
    ]
    if embeddings:
        yield embeddings, partial(_of_tables, model, embeddings, planned, windows, text)
    if not linears:
        return
    stream = BlockStream(model, windows)
    for index in range(max(inside, default=-1) + 1):
        batch = inside.get(index, {})
        stages = [list(batch)] if batch else []
        if any(each.staged for each in effort) and batch:
            stages = stream.stages(index, {name: matrix.module for name, matrix in batch.items()})
            stages = _undivided(stages, families)
        for stage in stages:
            last = stage is stages[-1]
            measure = partial(_of_linears, stream, reference, index, batch, stage, last, found)
            yield [batch[name] for name in stage], measure
        if index < max(inside):
            stream.advance(index)
    placed = {name for batch in inside.values() for name in batch}
    outside = {name: matrix for name, matrix in linears.items() if name not in placed}
    if outside:
        yield list(outside.values()), partial(_of_outside, stream, outside)


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


def _of_linears(
    stream: BlockStream,
    reference: Reference | None,
    index: int,
    batch: Mapping[str, Matrix],
    stage: list[str],
    last: bool,
    found: Search,
) -> dict[str, Statistics]:
    """Of the layers of one stage; feedback and gradients for those that share a budget."""
    corrected = [name for name in stage if reference is not None and name in found.efforts]
    plain = {name: batch[name].module for name in stage if name not in corrected}
    known = {}
    if plain:
        known = {name: Statistics(input_moment=moment) for name, moment in stream.input_moments(index, plain).items()}
    if reference is not None and corrected:
        turned = [name for name in corrected if name in found.turns and not found.turns[name].of_values]
        towards = {name: found.turns[name].weight(batch[name]) for name in turned}
        known |= reference.statistics(stream, index, {name: batch[name] for name in corrected}, last, towards)
    for name, each in known.items():
        known[name] = replace(each, gradient_moment=found.take_gradient(name), start=found.starts.pop(name, None))
        if name in found.turns:
            known[name] = found.turns[name].statistics(batch[name], known[name])
    return known


def _of_outside(stream: BlockStream, matrices: Mapping[str, Matrix]) -> dict[str, Statistics]:
    moments = stream.input_moments_outside({name: matrix.module for name, matrix in matrices.items()})
    return {name: Statistics(input_moment=moment) for name, moment in moments.items()}


def _of_tables(
    model: PreTrainedModel, tables: list[Matrix], planned: Plan, windows: Tensor, text: Text
) -> dict[str, Statistics]:
    """Of the input table: the counts of its tokens, the loss's gradients behind it, and what a tied head reads."""
    table = next((matrix for matrix in tables if matrix.group == "embedding"), None)
    counts = text.counts
    if table is None or counts is None:
        return {}
    if not planned.methods[table.name].fits_text:
        return {table.name: Statistics(counts=counts)}
    # Rows are scaled on their way in, as Gemma does.
    moments = gradient_moments(model, windows, {table.name: table.module}, text.prefix)
    gradients = moments[table.name].full(scale_of(table) ** 2)
    if table.tied_head is None:
        return {table.name: Statistics(gradient_moment=gradients, counts=counts)}

    def forward() -> None:
        for window in windows.to(table.parameter.device).split(1):
            model(window, use_cache=False)

    states = inputs_of(forward, model.get_submodule(table.tied_head), model)
    scale = _scale_of_logits(model, table, windows, states)
    states = states if scale is None else states * scale
    inputs = states.T @ states / len(states)
    reads = scale is not None and planned.methods[table.name].reads_states
    return {table.name: Statistics(inputs, gradients, counts, states if reads else None)}


def _scale_of_logits(model: PreTrainedModel, table: Matrix, windows: Tensor, states: Tensor) -> float | None:
    """a where the model's logits are ``a · E h`` (Cohere, Granite); None where they are biased or capped (Gemma 2).

    The first tokens decide; ``states`` begin with theirs, and no later token changes them.
    """
    few = windows[:1, :16].to(table.parameter.device)
    logits = model(few, use_cache=False).logits[0].float()
    products = states[: len(logits)] @ dense_weight(table.module).float().T
    scale = float((logits * products).sum() / products.square().sum().clamp_min(torch.finfo(torch.float32).tiny))
    return scale if (logits - scale * products).norm() <= 1e-2 * logits.norm() else None
