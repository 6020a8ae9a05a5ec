"""What a run of ``tensorfold compress`` came to: numbers, picture, table, speeds, how to load it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tensorfold.report.tables import Row

if TYPE_CHECKING:
    from tensorfold.report.figures import Chart

_NONE = "–"


def headline(outcome: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Three numbers of the result: each with what it is, and what it is measured against.

    Args:
        outcome: JSON values of ``compress.json``.
    """
    rows = outcome["rows"]
    dense, same, result = rows[0], _same_bits(outcome), rows[-1]
    speed = _times(result["prompt"], same["prompt"])
    return [
        (f"{result['bytes'] / 1e6:,.1f} MB", "of weights", f"{result['bytes'] / same['bytes']:.2f} of {same['name']}"),
        (
            f"{result['unseen']:,.2f}",
            f"perplexity on {outcome['texts']['unseen']}",
            f"{result['unseen'] / dense['unseen']:.2f} times the dense model's",
        ),
        (
            f"{result['prompt']:,.0f}" if result["prompt"] else _NONE,
            "prompt tokens a second",
            f"{speed:.2f} times {same['name']}" if speed else "not measured",
        ),
    ]


def outcome_rows(outcome: Mapping[str, Any]) -> list[Row]:
    """Rows of a table: every form of the model, with its ratios to the dense one."""
    dense = outcome["rows"][0]
    return [
        {
            "model": row["name"],
            "MB": _beside(row["bytes"] / 1e6, dense["bytes"] / 1e6, ",.1f"),
            f"perplexity, {outcome['texts']['own']}": _beside(row["own"], dense["own"], ",.2f"),
            f"perplexity, {outcome['texts']['unseen']}": _beside(row["unseen"], dense["unseen"], ",.2f"),
            "prompt tokens/s": _beside(row["prompt"], dense["prompt"], ",.0f"),
            "decoded tokens/s": _beside(row["decode"], dense["decode"], ",.0f"),
        }
        for row in outcome["rows"]
    ]


def loading(outcome: Mapping[str, Any]) -> str:
    """Commands and code that run the result."""
    path, order = outcome["rows"][-1]["path"], outcome["order"]
    command = f'tensorfold sample {path} --prompt "{outcome["prompt"]}"'
    if order["engine"] != "transformers":
        return f"{command}\n\n# code for the engine is in {path}/README.md"
    plain = order["plain"] and outcome["aim"]["bits"] == 32
    load = f'AutoModelForCausalLM.from_pretrained("{path}")' if plain else f'tensorfold.load("{path}")'
    names = "AutoModelForCausalLM, AutoTokenizer" if plain else "AutoTokenizer"
    return "\n".join(
        [
            *([] if plain else ["import tensorfold"]),
            f"from transformers import {names}",
            "",
            f"model = {load}",
            f'tokenizer = AutoTokenizer.from_pretrained("{path}")',
        ]
    )


@dataclass(frozen=True)
class Bar:
    """A bar of a speed.

    Attributes:
        name: The model's.
        value: Tokens a second, as text.
        beside: Ratio to the dense model, as text.
        part: Of the longest bar, 0 to 1.
        ours: Whether the model was folded.
    """

    name: str
    value: str
    beside: str
    part: float
    ours: bool


def speed_bars(outcome: Mapping[str, Any]) -> list[tuple[str, list[Bar]]]:
    """Bars of tokens a second, for prompts and for generated text; what was not measured has none."""
    found = []
    for key, title in (("prompt", "Prompt"), ("decode", "Generated text")):
        rows = [row for row in outcome["rows"] if row[key]]
        longest = max((row[key] for row in rows), default=0.0)
        bars = []
        for row in rows:
            ratio = _times(row[key], outcome["rows"][0][key])
            beside = f"{ratio:.2f}× dense" if ratio else ""
            bars.append(Bar(row["name"], f"{row[key]:,.0f}", beside, round(row[key] / longest, 4), row["ours"]))
        if bars:
            found.append((title, bars))
    return found


def outcome_chart(outcome: Mapping[str, Any]) -> Chart:
    """Chart of unseen perplexity against stored bytes, both on logarithmic axes."""
    from plotly import graph_objects as go

    from tensorfold.report.figures import SYMBOLS, chart_of, colour_of

    figure = go.Figure()
    for index, row in enumerate(outcome["rows"]):
        result = row is outcome["rows"][-1]
        figure.add_scatter(
            x=[row["bytes"] / 1e6],
            y=[row["unseen"]],
            mode="markers",
            name=row["name"] + (" (the result)" if result else ""),
            marker={
                "size": 18 if result else 12,
                "color": colour_of(index),
                "symbol": "star" if result else list(SYMBOLS)[index % len(SYMBOLS)],
            },
            hovertemplate="%{x:.1f} MB<br>perplexity %{y:.4g}",
        )
    for update, key, scale in ((figure.update_xaxes, "bytes", 1e-6), (figure.update_yaxes, "unseen", 1.0)):
        update(type="log", **_ticks([scale * row[key] for row in outcome["rows"]]))
    figure.update_xaxes(title_text="stored weights (MB)")
    figure.update_yaxes(title_text="perplexity")
    note = (
        f"Perplexity by protocol {outcome['rows'][0]['protocol']} on {outcome['texts']['unseen']}; lower and further "
        "left is better, and both axes are logarithmic. Where a dense model lies below and left of the result, folding "
        "is pointless at that size for such text."
    )
    return chart_of("outcome-sizes", "Size against quality, beside the dense model in fewer bits", note, figure, 360)


def _ticks(values: Sequence[float]) -> dict[str, Any]:
    """Three to seven round numbers for a logarithmic axis that shows all values with room around them."""
    low, high = min(values) / 1.15, max(values) * 1.15
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)):
        inside = [step * 10**power for power in range(first, last + 1) for step in steps]
        inside = [each for each in inside if low <= each <= high]
        if len(inside) >= 3:
            break
    texts = [f"{each:,.4g}" for each in inside]
    return {"range": [math.log10(low), math.log10(high)], "tickvals": inside, "ticktext": texts}


def _same_bits(outcome: Mapping[str, Any]) -> Mapping[str, Any]:
    """Row of the dense model in the result's bits."""
    name = dense_name(outcome["aim"]["bits"])
    found: Mapping[str, Any] = next(row for row in outcome["rows"] if row["name"] == name)
    return found


def dense_name(bits: int) -> str:
    """Name of the dense model in some bits, among the rows of an outcome."""
    return "dense" if bits == 32 else f"dense, {bits} bits"


def _times(value: float | None, base: float | None) -> float | None:
    return value / base if value and base else None


def _beside(value: float | None, base: float | None, form: str) -> str:
    ratio = _times(value, base)
    return _NONE if value is None else f"{value:{form}}" + (f" ({ratio:.2f}×)" if ratio else "")
