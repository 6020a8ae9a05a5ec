"""Tables of the report, as rows of text that the template escapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensorfold.algebra.specs.structure import Structure
from tensorfold.report.facts import Evaluated, Folded, ModelFacts, number, place, whole_number

_MOST_BENCH_ROWS = 60
_MOST_RIVALS = 2

Row = dict[str, str]


@dataclass(frozen=True)
class Judgement:
    """Table of recorded perplexities by one protocol, on one text and number of tokens.

    Attributes:
        protocol: Name of the protocol.
        text: Name of the text.
        tokens: Number of predicted tokens, as text.
        rows: One row a model.
    """

    protocol: str
    text: str
    tokens: str
    rows: list[Row]


def size_rows(models: Sequence[ModelFacts]) -> list[Row]:
    """Rows of parameters and stored bytes of every model before folding and now."""
    return [
        {
            "model": model.label,
            "folded from": model.base or ("unknown" if model.is_folded else "not folded"),
            "recipe": model.recipe or ("unknown" if model.is_folded else "–"),
            "calibration": model.calibration or ("none noted" if model.is_folded else "–"),
            "parameters before": f"{model.parameters_before:,}",
            "parameters": f"{model.parameters:,}",
            "kept": f"{model.parameters / model.parameters_before:.1%}" if model.parameters_before else "unknown",
            "stored before": f"{model.bytes_before / 1e6:,.1f} MB",
            "weight files": f"{model.weight_bytes / 1e6:,.1f} MB",
        }
        for model in models
    ]


def judgements(models: Sequence[ModelFacts]) -> list[Judgement]:
    """Tables of recorded perplexities, one for every protocol, text and number of tokens.

    Where just one dense model was evaluated, a column divides by its perplexity.
    """
    judges = dict.fromkeys(each.judge for model in models for each in model.evaluations)
    found = []
    for judge in judges:
        rows = [(model, each) for model in models for each in model.evaluations if each.judge == judge]
        dense = [each.perplexity for model, each in rows if not model.is_folded]
        reference = dense[0] if len(dense) == 1 else None
        protocol, text, tokens = judge
        table = [_judged(model, each, reference) for model, each in rows]
        found.append(Judgement(protocol, text, f"{tokens:,}", table))
    return found


def _judged(model: ModelFacts, each: Evaluated, reference: float | None) -> Row:
    """Row of one evaluation; ``reference`` is the dense model's perplexity, if there is one."""
    where = each.where or "unknown"
    return {
        "model": model.label,
        "parameters": f"{each.parameters:,}",
        "perplexity": f"{each.perplexity:,.2f}" if each.perplexity < 1e5 else f"{each.perplexity:.2e}",
        **({} if reference is None else {"× dense": _significant(each.perplexity / reference)}),
        "accuracy": "unknown" if each.accuracy is None else f"{each.accuracy:.1%}",
        "computed in": where if each.held_out else f"{where}; on text that is not held out",
    }


def bond_rows(model: ModelFacts) -> list[Row]:
    """Rows of structure and bonds of a model's folded modules; equal modules of different blocks share a row."""
    groups: dict[tuple[str, Structure], list[tuple[int | None, Folded]]] = {}
    for name, folded in model.modules.items():
        block, matrix = place(name)
        groups.setdefault((matrix, folded.spec), []).append((block, folded))
    rows = []
    for (matrix, spec), members in groups.items():
        errors = [folded.error for _, folded in members if folded.error is not None]
        sizes = sorted({folded.bytes for _, folded in members if folded.bytes is not None})
        rows.append(
            {
                "matrix": matrix,
                "blocks": _ranges([block for block, _ in members if block is not None]) or "outside",
                "structure": str(spec),
                "bonds": ", ".join(map(str, spec.modes_and_ranks()["ranks"])) or "none",
                "at most": ", ".join(map(str, spec.largest_ranks)) or "none",
                "parameters each": f"{spec.parameters:,}",
                "kept": f"{spec.parameters / spec.dense_parameters:.1%}",
                "bytes each": " or ".join(f"{size:,}" for size in sizes) or "unknown",
                "mean error": f"{sum(errors) / len(errors):.3f}" if errors else "unknown",
            }
        )
    return rows


def choice_rows(model: ModelFacts) -> list[Row]:
    """Rows of what a search gave each layer: predicted and measured error, and what the nearest sizes would have lost.

    The prediction is for the dense model's inputs; the error was measured when the layer was folded, behind layers that
    were folded already. The best of the other structures that were priced at the same size stand beside them.
    """
    rows = []
    for name, chosen in model.choices.items():
        folded, predicted = model.modules.get(name), chosen.predicted
        smaller = max((point for point in chosen.curve if point[0] < chosen.parameters), default=None)
        larger = min((point for point in chosen.curve if point[0] > chosen.parameters), default=None)
        rivals = sorted(chosen.rivals.items(), key=lambda rival: rival[1])[:_MOST_RIVALS]
        rows.append(
            {
                "matrix": name,
                "given": "dense" if folded is None else str(folded.spec),
                "parameters": f"{chosen.parameters:,.0f}",
                "predicted error": "unknown" if predicted is None else f"{predicted:.3f}",
                "measured": "–" if folded is None else "unknown" if folded.error is None else f"{folded.error:.3f}",
                "with fewer": "–" if smaller is None else f"{smaller[1]:.3f} at {smaller[0]:,.0f}",
                "with more": "–" if larger is None else f"{larger[1]:.3f} at {larger[0]:,.0f}",
                "others of this size": "; ".join(f"{spec}: {error:.3f}" for spec, error in rivals) or "–",
            }
        )
    return rows


def healing_rows(models: Sequence[ModelFacts]) -> list[Row]:
    """Rows of steps, tokens and validation losses of the models that were healed, by their cards."""
    rows = []
    for model in models:
        if model.healed is None:
            continue
        before, after = (number(model.healed.get(key)) for key in ("validation_loss_before", "validation_loss"))
        steps, tokens, trained = (
            whole_number(model.healed.get(key)) for key in ("steps", "tokens", "trained_parameters")
        )
        rows.append(
            {
                "model": model.label,
                "text": str(model.healed.get("text", "unknown"))[:1000],
                "steps": _count(steps),
                "tokens": _count(tokens),
                "trained parameters": _count(trained),
                "validation loss before": "unknown" if before is None else f"{before:.4f}",
                "after": "unknown" if after is None else f"{after:.4f}",
            }
        )
    return rows


def bench_rows(bench: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of path and value from a benchmark's JSON record, ratios first; the last row counts rows left out."""
    found = list(_leaves(bench, ""))
    found.sort(key=lambda row: not any(word in row[0] for word in ("speedup", "ratio")))
    more = len(found) - _MOST_BENCH_ROWS
    return found[:_MOST_BENCH_ROWS] + ([("…", f"{more} more")] if more > 0 else [])


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Paths and texts of all numbers and words inside a JSON value, at most nine levels deep."""
    if path.count("›") > 8:
        return
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path} › {key}" if path else str(key))
    elif isinstance(value, list):
        for place_, inner in enumerate(value):
            yield from _leaves(inner, f"{path} › {place_}" if path else str(place_))
    elif isinstance(value, float):
        yield path, _significant(value)
    elif value is not None:
        yield path, str(value)[:300]


def _ranges(blocks: Sequence[int]) -> str:
    """Text of whole numbers with their runs drawn together.

    >>> _ranges([0, 1, 2, 5])
    '0–2, 5'
    """
    runs: list[list[int]] = []
    for block in sorted(blocks):
        if runs and block == runs[-1][1] + 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)


def _count(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _significant(value: float) -> str:
    """Text of a number with two decimals, or three significant digits if it is very small or large."""
    return f"{value:.2f}" if 0.1 <= abs(value) < 1e5 else f"{value:.3g}"
