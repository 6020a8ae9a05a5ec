"""What a run of ``tensorfold compress`` came to, at the top of the page: numbers, picture, table, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
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
    """Code that loads the result."""
    path, order = outcome["rows"][-1]["path"], outcome["order"]
    if order["engine"] != "transformers":
        return f'tensorfold sample {path} --prompt "Once upon a time"   # and code for the engine: {path}/README.md'
    if order["plain"] and outcome["aim"]["bits"] == 32:
        return (
            f'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("{path}")'
        )
    return f'import tensorfold\n\nmodel = tensorfold.load("{path}")'


def outcome_chart(outcome: Mapping[str, Any]) -> Chart:
    """Chart of unseen perplexity against stored bytes, both on logarithmic axes."""
    from plotly import graph_objects as go

    from tensorfold.report.figures import SYMBOLS, chart_of, colour_of

    figure = go.Figure()
    for index, row in enumerate(outcome["rows"]):
        figure.add_scatter(
            x=[row["bytes"] / 1e6],
            y=[row["unseen"]],
            mode="markers",
            name=row["name"],
            marker={"size": 13, "color": colour_of(index), "symbol": list(SYMBOLS)[index % len(SYMBOLS)]},
            hovertemplate="%{x:.1f} MB<br>perplexity %{y:.4g}",
        )
    figure.update_xaxes(title_text="stored weights (MB)", type="log")
    figure.update_yaxes(title_text="perplexity", type="log")
    note = (
        f"Perplexity by protocol {outcome['rows'][0]['protocol']} on {outcome['texts']['unseen']}; lower and further "
        "left is better. A dense model that lies below and left of the result makes folding pointless at that size."
    )
    return chart_of("outcome-sizes", "Size against quality, beside the dense model in fewer bits", note, figure, 360)


def _same_bits(outcome: Mapping[str, Any]) -> Mapping[str, Any]:
    """Row of the dense model in the result's bits."""
    dense = [row for row in outcome["rows"] if not row["ours"]]
    found: Mapping[str, Any] = dense[0] if outcome["aim"]["bits"] == 32 else dense[1]
    return found


def _times(value: float | None, base: float | None) -> float | None:
    return value / base if value and base else None


def _beside(value: float | None, base: float | None, form: str) -> str:
    ratio = _times(value, base)
    return _NONE if value is None else f"{value:{form}}" + (f" ({ratio:.2f}×)" if ratio else "")
