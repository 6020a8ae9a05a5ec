"""Write the tables of README.md and the pictures from ``runs.jsonl`` and ``logs/``: python studies/picogpt/table.py"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib.pyplot as plt
from pages import save_picture, write_sections

HERE = Path(__file__).parent

SYSTEMS = {
    "dense": "dense", "mpo": "MPO, the paper's sites", "mpo2": "MPO, 2 sites", "mpo3": "MPO, 3 sites",
    "low-rank": "low rank", "kronecker": "Kronecker sum", "layers": "fewer layers",
}  # fmt: skip
FOLDED = "folded from the trained dense model, healed"
STARTS = {
    "random": "random", "fold": FOLDED, "fold-fast": f"{FOLDED} at 2e-2", "fold-long": f"{FOLDED} at 2e-2",
    "fold-calibrated": f"{FOLDED} at 2e-2, fold calibrated",
    "fold-calibrated-long": f"{FOLDED} at 2e-2, fold calibrated",
}  # fmt: skip
# χ -> loss and accuracy as the paper prints them; 0 is the dense model.
PRINTED = {0: (1.860, 0.528), 4: (2.220, 0.368), 8: (1.950, 0.468), 16: (1.850, 0.516), 32: (1.850, 0.524)}

Run = dict[str, Any]


def grouped(runs: list[Run]) -> list[list[Run]]:
    """Runs that differ in nothing but the seed."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["schedule"], run["system"], run["size"], run["start"]), []).append(run)
    return list(groups.values())


def spread(group: list[Run], value: Callable[[Run], float], digits: int) -> str:
    values = [value(run) for run in group]
    middle = f"{statistics.mean(values):.{digits}f}"
    return middle if len(values) < 2 else f"{middle} ± {statistics.stdev(values):.{digits}f}"


def label(run: Run) -> str:
    if run["system"] == "layers":
        return f"{run['size']} of 4 layers"
    if not run["system"].startswith("mpo"):
        return SYSTEMS[run["system"]]
    chi = f", χ = {run['size']}" if run["size"] <= 32 else ", at equal parameters"
    return SYSTEMS[run["system"]] + chi


def table(runs: list[Run]) -> str:
    trained = {run["seed"]: run["after"]["accuracy"] for run in runs if run["system"] == "dense"}
    # Its own dense model's where the run names it: one that was missing has been trained again, to other last digits.
    dense = {run["run"]: run["dense"]["accuracy"] if "dense" in run else trained.get(run["seed"]) for run in runs}
    lines = [
        "| model | start | parameters | loss | accuracy | of the dense accuracy | accuracy, random windows | steps | "
        "seeds | paper: loss, accuracy |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    order = list(SYSTEMS)
    for group in sorted(grouped(runs), key=lambda g: (order.index(g[0]["system"]), g[0]["start"], g[0]["parameters"])):
        first = group[0]
        paired = [run for run in group if dense[run["run"]]]
        share = spread(paired, lambda run: 100 * run["after"]["accuracy"] / dense[run["run"]], 1) if paired else "–"
        printed = PRINTED.get(first["size"]) if first["system"] in ("dense", "mpo") else None
        cells = [
            label(first),
            STARTS[first["start"]],
            f"{first['parameters']:,}",
            spread(group, lambda run: run["after"]["loss"], 3),
            spread(group, lambda run: 100 * run["after"]["accuracy"], 2) + " %",
            share + " %",
            spread(group, lambda run: 100 * run["after"]["random_accuracy"], 2) + " %",
            str(first["steps"]),
            str(len(group)),
            f"{printed[0]:.3f}, {100 * printed[1]:.1f} %" if printed else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def validation(run: Run) -> tuple[list[int], list[float], list[float]]:
    """Steps, losses and accuracies of the evaluations in a run's log."""
    lines = [json.loads(line) for line in (HERE / "logs" / f"{run['run']}.jsonl").read_text().splitlines()]
    kept = [line for line in lines if "validation_loss" in line]
    return tuple([line[key] for line in kept] for key in ("step", "validation_loss", "validation_accuracy"))  # type: ignore[return-value]


def curves(runs: list[Run], schedule: str) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for run in runs:
        if run["seed"] == 0 and run["start"] == "random":
            steps, losses, accuracies = validation(run)
            left.plot(steps, losses, label=label(run))
            right.plot(losses, [100 * each for each in accuracies], "o-", markersize=2, label=label(run))
    for chi, (loss, accuracy) in PRINTED.items():
        right.plot(loss, 100 * accuracy, "kx")
        right.annotate(f"paper, χ={chi}" if chi else "paper, dense", (loss, 100 * accuracy), fontsize=7)
    left.set(xlabel="step", ylabel="validation loss, nats a character", title=f"{schedule} schedule, from random")
    right.set(xlabel="validation loss", ylabel="accuracy, %", title="which accuracy belongs to which loss")
    left.legend(fontsize=7)
    save_picture(figure, HERE / f"curves-{schedule}.svg")


def pareto(runs: list[Run], schedule: str) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5))
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for group in grouped(runs):
        accuracy = 100 * statistics.mean(run["after"]["accuracy"] for run in group)
        lines.setdefault((group[0]["system"], group[0]["start"]), []).append((group[0]["parameters"], accuracy))
    for (system, start), points in lines.items():
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, "o--" if start == "random" else "o-", label=f"{SYSTEMS[system]}, {start}")
    axes.set(xscale="log", xlabel="parameters", ylabel="validation accuracy, %", title=f"{schedule} schedule")
    axes.legend(fontsize=7)
    save_picture(figure, HERE / f"pareto-{schedule}.svg")


def reconstruction(runs: list[Run], schedule: str) -> None:
    """Relative errors against the dense matrix, right after folding and after healing, by χ and kind of matrix."""
    folded = sorted(
        (run for run in runs if run["system"] == "mpo" and run["start"] == "fold" and run["seed"] == 0),
        key=lambda run: run["size"],
    )
    if not folded:
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for side, when in zip(axes, ("before", "after"), strict=True):
        for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "lm_head"):
            means = [
                statistics.mean(e for name, e in run[f"errors_{when}"].items() if name.endswith(kind)) for run in folded
            ]
            side.plot([run["size"] for run in folded], means, "o-", label=kind)
        side.set(xlabel="bond dimension χ", xscale="log", title=f"{when} healing, {schedule} schedule")
    axes[0].set(ylabel="relative error of the matrix, mean over layers")
    axes[1].legend(fontsize=7)
    save_picture(figure, HERE / f"reconstruction-{schedule}.svg")


def by_schedule() -> dict[str, list[Run]]:
    runs = [json.loads(line) for line in (HERE / "runs.jsonl").read_text().splitlines()]
    chosen = {schedule: [run for run in runs if run["schedule"] == schedule] for schedule in ("paper", "tuned")}
    return {schedule: runs for schedule, runs in chosen.items() if runs}


def sections() -> dict[str, str]:
    tables = [f"### The {schedule} schedule\n\n{table(runs)}" for schedule, runs in by_schedule().items()]
    return {"tables": "\n\n".join(tables)}


def main() -> None:
    write_sections(HERE / "README.md", sections())
    for schedule, runs in by_schedule().items():
        for picture in (curves, pareto, reconstruction):
            picture(runs, schedule)


if __name__ == "__main__":
    main()
