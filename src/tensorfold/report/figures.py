"""Charts of the report as plotly figures. The page's script gives them the colours of a light or dark reader."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from plotly import graph_objects as go

from tensorfold.report.facts import Evaluated, ModelFacts, number, place, whole_number

# Readable on white and on near-black; a model has the same colour in every chart.
PALETTE = ("#3d85c6", "#d9702b", "#2e9e68", "#b05fb0", "#a8861a", "#d9534f", "#3aa6a0", "#8590a2")
SYMBOLS = {
    "circle": "●",
    "square": "■",
    "diamond": "◆",
    "triangle-up": "▲",
    "cross": "✚",
    "star": "★",
    "hexagon": "⬢",
    "triangle-down": "▼",
}

_CURVE_POINTS = 300
_SPECTRUM_POINTS = 48
_LONGEST_NAME = 48


@dataclass(frozen=True)
class Entry:
    """One line of a legend.

    Attributes:
        sign: Character like the traces' markers or lines.
        colour: CSS colour of the traces.
        name: Their name.
        traces: Their indices among the figure's traces.
    """

    sign: str
    colour: str
    name: str
    traces: tuple[int, ...]


@dataclass(frozen=True)
class Chart:
    """A figure with the heading, the sentence and the legend around it.

    The legend is the page's own: plotly's takes its room from the chart, and on a phone all of it.

    Attributes:
        id: Id of the page's element.
        title: Heading.
        note: Sentence that says what is drawn.
        figure: plotly's JSON form.
        legend: Lines of the legend.
    """

    id: str
    title: str
    note: str
    figure: Mapping[str, Any]
    legend: tuple[Entry, ...] = ()

    @property
    def height(self) -> int:
        """Height in pixels."""
        height: int = self.figure["layout"]["height"]
        return height


def pareto(judge: tuple[str, str, int], rows: Sequence[tuple[int, ModelFacts, Evaluated]], name: str) -> Chart:
    """Chart of perplexity against parameters by one judge, with the Pareto front of the models.

    Args:
        judge: Protocol, text and number of tokens.
        rows: Index of the model in the report (for its colour), the model, its evaluation.
        name: Id of the chart.
    """
    protocol, text, tokens = judge
    figure = go.Figure()
    front = _front([(each.parameters, each.perplexity) for _, _, each in rows])
    if len(front) > 1:
        figure.add_scatter(
            x=[x / 1e6 for x, _ in front],
            y=[y for _, y in front],
            mode="lines",
            name="Pareto front",
            line={"dash": "dot", "width": 1, "color": "#8590a2"},
            hoverinfo="skip",
        )
    for index, model, each in rows:
        figure.add_scatter(
            x=[each.parameters / 1e6],
            y=[each.perplexity],
            mode="markers",
            name=_plain(model.label),
            marker={"size": 12, "color": colour_of(index), "symbol": list(SYMBOLS)[index % len(SYMBOLS)]},
            hovertemplate="%{x:.2f} M parameters<br>perplexity %{y:.4g}",
        )
    perplexities = [each.perplexity for _, _, each in rows]
    figure.update_xaxes(title_text="parameters (millions)", rangemode="normal")
    figure.update_yaxes(title_text="perplexity", type="log" if max(perplexities) > 20 * min(perplexities) else "linear")
    note = (
        f"Perplexity by protocol {protocol} on {text}, {tokens:,} predicted tokens; lower and further left is better."
    )
    if len(front) > 1:
        note += " The dotted front joins the models that no other one shown is both smaller and better than."
    return chart_of(name, f"{protocol}, {text}", note, figure, 340)


def error_map(model: ModelFacts, highest: float, name: str) -> Chart | None:
    """Heat map of folding's relative error by block and matrix; None where no error inside the blocks is known.

    Args:
        model: A folded model.
        highest: End of the colour scale, equal for all models of a page.
        name: Id of the chart.
    """
    cells = {place(module): folded for module, folded in model.modules.items() if folded.error is not None}
    columns = list(dict.fromkeys(matrix for block, matrix in cells if block is not None))
    rows = sorted({block for block, _ in cells if block is not None})
    if not rows:
        return None
    grid = [[cells.get((row, column)) for column in columns] for row in rows]
    figure = go.Figure(
        go.Heatmap(
            x=[_plain(column) for column in columns],
            y=[str(row) for row in rows],
            z=[[cell and cell.error for cell in line] for line in grid],
            customdata=[
                [_plain(f"{cell.spec}, {cell.metric} error") if cell else "" for cell in line] for line in grid
            ],
            hovertemplate="block %{y}, %{x}: %{z:.4f}<br>%{customdata}<extra></extra>",
            zmin=0.0,
            zmax=highest,
            colorscale="Viridis",
            xgap=1,
            ygap=1,
            colorbar={"orientation": "h", "thickness": 10, "y": -0.02, "yanchor": "top", "title": "relative error"},
        )
    )
    figure.update_xaxes(side="top", type="category", tickangle=-45)
    room = 24 + 5 * min(_LONGEST_NAME, max(len(column) for column in columns))  # pixels that a slanted name needs
    figure.update_yaxes(title_text="block", type="category", autorange="reversed")
    metrics = sorted({folded.metric or "unknown" for (block, _), folded in cells.items() if block is not None})
    note = f"Relative error of each folded matrix ({' and '.join(metrics)} metric)"
    note += " as folded, before healing." if model.healed else "."
    outside = [f"{matrix} {folded.error:.3f}" for (block, matrix), folded in cells.items() if block is None]
    if outside:
        note += f" Outside the blocks: {', '.join(outside)}."
    height = 70 + room + max(8, min(16, 900 // len(rows))) * len(rows)
    chart = chart_of(name, model.label, note, figure, height)
    # Slanted names and automatic margins chase each other on a narrow page.
    figure.update_xaxes(automargin=False)
    figure.update_layout(margin={"t": room, "r": max(12, room - 32)})
    return dataclasses.replace(chart, figure=figure.to_plotly_json())


def spectra(model: ModelFacts, name: str) -> Chart | None:
    """Chart of the singular values at the bonds of every folded module; None where no module has any."""
    figure = go.Figure()
    kinds: dict[str, int] = {}
    for module, folded in model.modules.items():
        _, matrix = place(module)
        for bond, values in enumerate(folded.spectra, start=1):
            if not len(values) or values[0] <= 0:
                continue
            kind = matrix if len(folded.spectra) == 1 else f"{matrix}, bond {bond}"
            colour = colour_of(kinds.setdefault(kind, len(kinds)))
            at = _spread(len(values), _SPECTRUM_POINTS)
            relative = (values / values[0]).clamp_min(1e-9)[torch.tensor(at)]
            figure.add_scatter(
                x=[index + 1 for index in at],
                y=[float(f"{value:.4g}") for value in relative.tolist()],
                mode="lines+markers" if len(at) == 1 else "lines",
                name=_plain(kind),
                line={"width": 1, "color": colour},
                opacity=0.7,
                text=_plain(module),
                hovertemplate="%{text}<br>no. %{x}: %{y:.3g} of the largest<extra></extra>",
            )
    if not kinds:
        return None
    figure.update_xaxes(title_text="number of the singular value")
    figure.update_yaxes(title_text="σ / largest σ", type="log")
    note = (
        "Singular values of the folded matrices at their bonds, computed from the cores and divided by the largest; a "
        "line a module and bond. A line that ends high was cut where there was still something to keep. What the dense "
        "matrix had beyond the bond cannot be read from this directory."
    )
    return chart_of(name, model.label, note, figure, 360)


def choices(model: ModelFacts, name: str) -> Chart | None:
    """Chart of error against size of every layer that shared a budget, with the size given; None without any."""
    figure = go.Figure()
    kinds: dict[str, int] = {}
    for module, chosen in model.choices.items():
        _, kind = place(module)
        colour = colour_of(kinds.setdefault(kind, len(kinds)))
        figure.add_scatter(
            x=[x for x, _ in chosen.curve],
            y=[y for _, y in chosen.curve],
            mode="lines",
            name=_plain(kind),
            line={"width": 1, "color": colour},
            opacity=0.5,
            text=_plain(module),
            hovertemplate="%{text}<br>%{x:,} parameters: error %{y:.3g}<extra></extra>",
        )
        given = [(x, y) for x, y in chosen.curve if x == chosen.parameters]
        figure.add_scatter(
            x=[x for x, _ in given],
            y=[y for _, y in given],
            mode="markers",
            name=_plain(kind),
            marker={"size": 6, "color": colour},
            text=_plain(module),
            hovertemplate="%{text}<br>given %{x:,} parameters: error %{y:.3g}<extra></extra>",
        )
    if not kinds:
        return None
    figure.update_xaxes(title_text="parameters")
    figure.update_yaxes(title_text="error of the best low rank")
    note = (
        "What every layer would lose of its output at other sizes, measured by what errors cost the loss, and the size "
        "that the search gave it: where a parameter buys as much as in every other layer."
    )
    return chart_of(name, model.label, note, figure, 360)


def losses(models: Sequence[tuple[int, ModelFacts]], name: str) -> Chart | None:
    """Chart of training and validation loss of end-to-end healing by step; None where no log has any.

    Args:
        models: Index of the model in the report (for its colour), and the model.
        name: Id of the chart.
    """
    figure = go.Figure()
    smoothed = 1
    for index, model in models:
        log = [record for record in model.heal_log if "stage" not in record]
        training, run = _means(_points(log, "loss"))
        smoothed = max(smoothed, run)
        validation = _points(log, "validation_loss")
        for points, kind, style in (
            (training, "training", {"mode": "lines", "line": {"width": 1, "color": colour_of(index)}, "opacity": 0.6}),
            (
                validation,
                "validation",
                {"mode": "lines+markers", "line": {"width": 2, "color": colour_of(index)}, "marker": {"size": 6}},
            ),
        ):
            if points:
                x, y = zip(*points, strict=True)
                figure.add_scatter(
                    x=x, y=y, name=_plain(f"{model.label}, {kind}"), hovertemplate="step %{x}: %{y:.4f}", **style
                )
    if not figure.data:
        return None
    figure.update_xaxes(title_text="step")
    figure.update_yaxes(title_text="loss")
    note = (
        "Training loss as the run defines it (with a teacher it holds more than the cross-entropy), and validation "
        "loss, the cross-entropy on the held-out end of the training text, in nats a token."
    )
    if smoothed > 1:
        note += f" Long runs are drawn as means of up to {smoothed} logged steps."
    return chart_of(name, "End to end", note, figure, 340)


def block_losses(model: ModelFacts, name: str) -> Chart | None:
    """Chart of the training loss of block-by-block healing, a line a block; None where the log has none."""
    by_block: dict[int, list[dict[str, Any]]] = {}
    for record in model.heal_log:
        block = whole_number(record.get("block"))
        if record.get("stage") == "blockwise" and block is not None:
            by_block.setdefault(block, []).append(record)
    figure = go.Figure()
    highest = max(by_block, default=0) or 1
    for block, records in sorted(by_block.items()):
        points, _ = _means(_points(records, "loss"))
        if points:
            x, y = zip(*points, strict=True)
            figure.add_scatter(
                x=x,
                y=y,
                mode="lines",
                line={"width": 1, "color": f"hsl({200 + 140 * block // highest}, 60%, 50%)"},
                hovertemplate=f"block {block}, step %{{x}}: %{{y:.4g}}<extra></extra>",
            )
    if not figure.data:
        return None
    figure.update_xaxes(title_text="step of the block")
    figure.update_yaxes(title_text="loss relative to the target", type="log")
    note = (
        "Squared distance of each block's output from the teacher's over the teacher's own, on the training text; "
        "blue lines are the first blocks, red ones the last."
    )
    return chart_of(name, f"Block by block: {model.label}", note, figure, 340)


def chart_of(name: str, title: str, note: str, figure: Any, height: int) -> Chart:
    """Chart from a plotly figure, in the layout that all of them have."""
    figure.update_layout(
        template=None,
        height=height,
        margin={"l": 12, "r": 12, "t": 12, "b": 12},
        showlegend=False,
        hoverlabel={"namelength": -1},
    )
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    return Chart(name, title, note, figure.to_plotly_json(), tuple(_legend(figure)))


def _legend(figure: Any) -> Iterator[Entry]:
    """Entries of a legend, one for every name that a figure's traces have."""
    traces: dict[str, list[int]] = {}
    for index, trace in enumerate(figure.data):
        if trace.name:
            traces.setdefault(trace.name, []).append(index)
    for name, indices in traces.items():
        first = figure.data[indices[0]]
        marks = first.mode == "markers"
        sign = SYMBOLS[first.marker.symbol] if marks else "┅" if first.line.dash else "━"
        yield Entry(sign, first.marker.color if marks else first.line.color, html.unescape(name), tuple(indices))


def colour_of(index: int) -> str:
    """Colour number ``index`` of the palette, which begins again at its end."""
    return PALETTE[index % len(PALETTE)]


def _plain(text: str) -> str:
    """Escape a text for plotly, which reads some HTML in labels; long names are cut in the middle."""
    if len(text) > _LONGEST_NAME:
        text = f"{text[: _LONGEST_NAME // 2]}…{text[-_LONGEST_NAME // 2 :]}"
    return html.escape(text)


def _front(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Pareto front of points (parameters, perplexity), from small to large: no other point is smaller and better."""
    front: list[tuple[int, float]] = []
    for parameters, perplexity in sorted(set(points)):
        if not front or perplexity < front[-1][1]:
            front.append((parameters, perplexity))
    return front


def _spread(count: int, most: int) -> list[int]:
    """Indices below ``count`` to draw: the first ones, where a spectrum bends, and ``most`` spread evenly over all."""
    if count <= most:
        return list(range(count))
    return sorted({*range(most // 4), *(round(k * (count - 1) / (most - 1)) for k in range(most))})


def _points(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Pairs of step and value from the records of a log that have both."""
    found = ((whole_number(record.get("step")), number(record.get(key))) for record in records)
    return [(step, value) for step, value in found if step is not None and value is not None]


def _means(points: list[tuple[int, float]]) -> tuple[list[tuple[int, float]], int]:
    """Means over equal runs of points, few enough to draw, each at its run's last step; and the length of a run."""
    run = max(1, math.ceil(len(points) / _CURVE_POINTS))
    parts = [points[k : k + run] for k in range(0, len(points), run)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts], run
