"""Write the study's tables and plot from ``runs.jsonl`` and ``smollm2.jsonl``: python studies/krony/table.py"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib.pyplot as plt
from pages import save_picture, write_sections

HERE = Path(__file__).parent


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
    questions = ["dense", "quarter", "half"]
    order = sorted(
        systems.values(),
        key=lambda group: (
            questions.index(group[0]["question"]),
            statistics.mean(run["after"]["held-out"] for run in group),
        ),
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


def smollm2_table(entries: list[dict[str, Any]]) -> str:
    fits = [entry for entry in entries if "weighted_als" in entry]
    one = [entry for entry in fits if "(1, 2)" in entry["what"]]
    lines = ["| matrix | Van Loan | weighted ALS | seconds |", "|---|---:|---:|---:|"]
    for entry in fits:
        lines.append(
            f"| {entry['what']} | {entry['van_loan']:.3f} | {entry['weighted_als']:.3f} | {entry['seconds']} |"
        )
    means = [statistics.mean(entry[key] for entry in one) for key in ("van_loan", "weighted_als", "seconds")]
    lines.append(f"| mean of the {len(one)} with (1, 2) | {means[0]:.3f} | {means[1]:.3f} | {means[2]:.1f} |")
    lines += ["", "| block | matrix | in place | common hidden order | both sides, each by itself |"]
    lines.append("|---|---|---:|---:|---:|")
    for entry in entries:
        if "common_hidden_order" in entry:
            block, joint = entry["what"].split()[0], entry["common_hidden_order"]
            lines.append(f"| {block} | all three | {joint['without']:.3f} | {joint['with']:.3f} | |")
            for name in ("gate_proj", "up_proj", "down_proj"):
                lines.append(f"| | {name} | {entry[name]['without']:.3f} | | {entry[name]['both_sides']:.3f} |")
    return "\n".join(lines)


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HERE / name).read_text().splitlines()]


def plot(runs: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(run["system"] for run in runs))
    names.sort(key=lambda name: -statistics.mean(r["after"]["held-out"] for r in runs if r["system"] == name))
    figure, axes = plt.subplots(figsize=(7, 0.34 * len(names) + 1))
    for height, name in enumerate(names):
        values = [run["after"]["held-out"] for run in runs if run["system"] == name]
        axes.plot(values, [height] * len(values), "o", color="C1" if "layers" in name else "C0", alpha=0.7)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("perplexity after healing, held-out text (disjoint-256); one dot a seed")
    axes.grid(axis="x", alpha=0.3)
    save_picture(figure, HERE / "healed.svg")


def sections() -> dict[str, str]:
    return {"table": table(read("runs.jsonl")), "smollm2": smollm2_table(read("smollm2.jsonl"))}


def main() -> None:
    write_sections(HERE / "README.md", sections())
    plot(read("runs.jsonl"))


if __name__ == "__main__":
    main()
