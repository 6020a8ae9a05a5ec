"""Write the tables of README.md and the picture from the logs: python studies/tensorgpt/table.py"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib.pyplot as plt
from pages import save_picture, write_sections

from tensorfold.algebra.orders.stored_orders import order_bytes

HERE = Path(__file__).parent

NAMES = {
    "graded": "graded low rank", "low-rank": "low rank", "token-mps": "TokenMPS (TensorGPT)",
    "mpo": "MPO, 2 sites, clustered tokens", "kronecker": "Kronecker sum, clustered tokens",
}  # fmt: skip
FITS = {
    "plain": "table alone",
    "text": "text",
    "text-16k": "text, 16,384 tokens, exponent .85",
    "text-24k": "text, 24,000 tokens",
}
Run = dict[str, Any]
ROWS = 49_152
ORDERED = ("graded", "mpo", "kronecker")  # tables that store an order of their tokens, a number for each


def read(name: str) -> list[Run]:
    path = HERE / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def number(perplexity: float) -> str:
    return f"{perplexity:,.0f}" if perplexity >= 1000 else f"{perplexity:.2f}"


def stored_bytes(run: Run) -> int:
    """Bytes of the table in float32, with the order of its tokens in the smallest integers that fit."""
    return 4 * int(run["table_parameters"]) + (order_bytes(ROWS, ROWS) if run["structure"] in ORDERED else 0)


def comparison(runs: list[Run]) -> str:
    dense = next(run for run in runs if run["structure"] == "dense")
    lines = [
        "| structure | fitted to | table | smaller | in bytes | whole model | perplexity | × dense | healed "
        "| × dense |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    order = ["dense", *NAMES]
    ranked = sorted(runs, key=lambda r: (order.index(r["structure"]), r["fit"] == "plain", -r["table_parameters"]))
    for run in ranked:
        before, after = run["before"]["wikitext-2"], run["after"]["wikitext-2"]
        base = dense["before"]["wikitext-2"]
        name = "dense (healed: the whole model)" if run["structure"] == "dense" else NAMES[run["structure"]]
        rank = f", {run['size']}" if run["structure"] == "token-mps" else ""
        lines.append(
            f"| {name}{rank} | {FITS[run['fit']] if run is not dense else ''} | {run['table_parameters']:,} | "
            f"{dense['table_parameters'] / run['table_parameters']:.2f}× | "
            f"{stored_bytes(dense) / stored_bytes(run):.2f}× | "
            f"{run['parameters']:,} | {number(before)} | "
            f"{number(before / base)} | {number(after)} | {number(after / base)} |"
        )
    return "\n".join(lines)


def untied(runs: list[Run]) -> str:
    dense = next(run for run in runs if run["structure"] == "dense")
    base = dense["before"]["wikitext-2"]
    lines = [
        "| table | its parameters | smaller | whole model | perplexity | × dense | healed | × dense |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in sorted((run for run in runs if run.get("untied")), key=lambda r: (-r["table_parameters"], r["size"])):
        before, after = run["before"]["wikitext-2"], run["after"]["wikitext-2"]
        name = NAMES[run["structure"]] + (f", {run['size']}" if run["structure"] == "token-mps" else " of its size")
        lines.append(
            f"| {name} | {run['table_parameters']:,} | {dense['table_parameters'] / run['table_parameters']:.2f}× | "
            f"{run['parameters']:,} | {number(before)} | {number(before / base)} | {number(after)} | "
            f"{number(after / base)} |"
        )
    return "\n".join(lines)


def long(runs: list[Run], dense: dict[str, float]) -> str:
    lines = [
        "| | state | wikitext-2-test | × dense | tinyshakespeare | × dense | processor time |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for run in sorted(runs, key=lambda run: -run["table_parameters"]):
        for state in ("before", "after"):
            cells = []
            for text in ("wikitext-2", "tinyshakespeare"):
                value = run[state][text]
                cells += [number(value), f"{value / dense[text]:.2f}" if text in dense else ""]
            spent = f"{run['healing_cpu_seconds'] / 60:.0f} min" if state == "after" else ""
            name = {"before": "folded" if run["structure"] != "dense" else "as it is", "after": "trained"}[state]
            lines.append(f"| {run['size'] if state == 'before' else ''} | {name} | {' | '.join(cells)} | {spent} |")
    return "\n".join(lines)


def speed(entries: list[Run]) -> str:
    lines = ["| | rank | folded | dense table | whole table rebuilt each time |", "|---|---:|---:|---:|---:|"]
    for what in ("lookup of 1024 tokens", "logits of 64 tokens"):
        for index, entry in enumerate(entries):
            times = entry[what]["milliseconds"]
            cells = [f"{times[form]:#.3g}".rstrip(".") for form in ("folded", "dense", "rebuilt")]
            lines.append(f"| {f'{what}, ms' if not index else ''} | {entry['rank']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def orders(entries: list[Run]) -> str:
    names = {"kronecker": "Kronecker", "mpo-3": "MPO, 3 sites", "mpo-2": "MPO, 2 sites"}
    errors = {(e["structure"], e["keep"], e["order"]): f"{e['error']:.4f}".removeprefix("0") for e in entries}
    lines = ["| structure | kept | own | frequency | clusters | low rank |", "|---|---:|---:|---:|---:|---:|"]
    for structure, name in names.items():
        for keep in sorted({keep for other, keep, _ in errors if other == structure}, reverse=True):
            own, frequency, clusters = (errors[structure, keep, order] for order in ("own", "frequency", "cluster"))
            low_rank = errors["low-rank", keep, "own"]
            lines.append(f"| {name} | {keep} | {own} | {frequency} | **{clusters}** | {low_rank} |")
    return "\n".join(lines)


def picture(runs: list[Run]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    dense = next(run for run in runs if run["structure"] == "dense")
    for side, state in zip(axes, ("before", "after"), strict=True):
        for index, structure in enumerate(NAMES):
            for fit, style in (("text", "o-"), ("plain", "x--")):
                chosen = sorted(
                    (run["table_parameters"], run[state]["wikitext-2"])
                    for run in runs
                    if (run["structure"], run["fit"]) == (structure, fit)
                )
                if chosen:
                    label = NAMES[structure] + (", text" if fit == "text" else "")
                    side.plot(*zip(*chosen, strict=True), style, color=f"C{index}", label=label)
        side.axhline(dense["before"]["wikitext-2"], color="gray", linewidth=1, label="dense")
        side.set(xscale="log", yscale="log", ylim=(20, 1e6), xlabel="parameters of the table")
        side.set_title("without training" if state == "before" else "after eight steps")
    axes[0].set(ylabel="perplexity, wikitext-2-test")
    axes[1].legend(fontsize=7)
    save_picture(figure, HERE / "smollm2.svg")


def sections() -> dict[str, str]:
    runs, healed = read("smollm2.jsonl"), read("long.jsonl")
    dense = {}
    for run in (run for run in (*runs, *healed) if run["structure"] == "dense"):
        dense |= run["before"]
    tied = [run for run in runs if not run.get("untied")]
    return {
        "comparison": comparison(tied),
        "untied": untied(runs),
        "long": long(healed, dense),
        "speed": speed(read("speed.jsonl")),
        "order": orders(read("order.jsonl")),
    }


def main() -> None:
    write_sections(HERE / "README.md", sections())
    picture([run for run in read("smollm2.jsonl") if not run.get("untied")])


if __name__ == "__main__":
    main()
