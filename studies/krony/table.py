"""Write the study's table and plot from ``runs.jsonl``: python studies/krony/table.py"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MARK = "<!-- table -->"


def spread(values: list[float], digits: int = 1) -> str:
    middle = f"{statistics.mean(values):,.{digits}f}"
    return middle if len(values) < 2 else f"{middle} ± {statistics.stdev(values):,.{digits}f}"


def table(runs: list[dict[str, Any]]) -> str:
    systems: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        systems.setdefault(run["system"], []).append(run)
    lines = [
        "| system | parameters | mean error | held out: before | after healing | wikitext-2: before | after | seeds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    order = sorted(
        systems.values(),
        key=lambda group: (group[0]["question"] != "quarter", statistics.mean(r["after"]["held-out"] for r in group)),
    )
    for group in order:
        first = group[0]
        error = "–" if first["mean_error"] is None else f"{first['mean_error']:.3f}"
        cells = [
            spread([run[when][text] for run in group])
            for text in ("held-out", "wikitext-2-test")
            for when in ("before", "after")
        ]
        cells = [first["system"], f"{first['parameters']:,}", error, *cells, str(len(group))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(runs: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(run["system"] for run in runs))
    names.sort(key=lambda name: -statistics.mean(r["after"]["held-out"] for r in runs if r["system"] == name))
    figure, axes = pyplot.subplots(figsize=(7, 0.34 * len(names) + 1))
    for height, name in enumerate(names):
        values = [run["after"]["held-out"] for run in runs if run["system"] == name]
        axes.plot(values, [height] * len(values), "o", color="C1" if "layers" in name else "C0", alpha=0.7)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("perplexity after healing, held-out text (disjoint-256); one dot a seed")
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(HERE / "healed.svg")


def main() -> None:
    runs = [json.loads(line) for line in (HERE / "runs.jsonl").read_text().splitlines()]
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    start, _, rest = text.partition(MARK)
    end = rest.partition(MARK)[2]
    readme.write_text(f"{start}{MARK}\n{table(runs)}\n{MARK}{end}", encoding="utf-8")
    plot(runs)


if __name__ == "__main__":
    main()
