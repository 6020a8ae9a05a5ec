"""Write the tables of README.md from the logs: python studies/heal/table.py"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from pages import write_sections

HERE = Path(__file__).parent
STATES = {
    "dense": "dense, not trained further",
    "folded": "folded",
    "block by block": "block by block",
    "end to end": "and end to end",
}
Entry = dict[str, Any]


def read(name: str) -> list[Entry]:
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]


def states(entries: list[Entry]) -> str:
    lines = [
        "| MLP kept | parameters | state | wikitext-2-test | × dense | tinyshakespeare | × dense | wall clock | "
        "processor time |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    dense = next(entry for entry in entries if entry["what"] == "dense")
    order = list(STATES)
    before = None
    for entry in sorted(entries, key=lambda e: (-e["keep"], order.index(e["what"]))):
        wiki, shake = entry["wikitext-2"]["perplexity"], entry["tinyshakespeare"]["perplexity"]
        first = entry["keep"] != before
        cells = [
            str(entry["keep"]) if first else "",
            f"{entry['parameters']:,}" if first else "",
            STATES[entry["what"]],
            f"{wiki:.2f}",
            f"{wiki / dense['wikitext-2']['perplexity']:.2f}",
            f"{shake:,.1f}",
            f"{shake / dense['tinyshakespeare']['perplexity']:.2f}",
            *(f"{entry[key] / 60:.1f} min" if key in entry else "" for key in ("seconds", "processor_seconds")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
        before = entry["keep"]
    return "\n".join(lines)


def mixture(entries: list[Entry]) -> str:
    lines = [
        "| model | parameters | state | wikitext-2-test | Tiny Shakespeare | LAMBADA | Brown | python-docs | "
        "unseen ratio | over the dense model healed alike | processor time |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    entries = [entry for entry in entries if "perplexity" in entry]  # without the sweep of rates
    came = next(entry for entry in entries if entry["state"] == "as it came")["perplexity"]
    healed = {entry["state"]: entry["perplexity"] for entry in entries if entry["system"] == "dense"}
    order = list(dict.fromkeys(entry["system"] for entry in sorted(entries, key=lambda e: -e["parameters"])))
    for entry in sorted(entries, key=lambda e: order.index(e["system"])):
        found = entry["perplexity"]
        alike = healed.get(entry["state"]) if "step" in entry else None
        control = "" if alike is None else f"{_unseen(found, alike):.3f}"
        took = entry.get("processor_seconds")
        cells = [
            entry["system"],
            f"{entry['parameters']:,}",
            entry["state"],
            *(f"{value:.2f}" for value in found.values()),
            f"{_unseen(found, came):.3f}",
            control,
            f"{took / 60:.1f} min" if took else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _unseen(found: dict[str, float], dense: dict[str, float]) -> float:
    """Geometric mean of perplexity over dense, of all texts but the first, by which models are usually quoted."""
    names = list(found)[1:]
    return math.exp(sum(math.log(found[name] / dense[name]) for name in names) / len(names))


def tasks(entries: list[Entry]) -> str:
    """Accuracy and its standard error, in per cent; normalised by length where a task has that."""
    lines = ["| model | state | HellaSwag, 500 items | PIQA | BLiMP |", "|---|---|---:|---:|---:|"]
    found = {(entry["system"], entry["state"], entry["task"]): entry["metrics"] for entry in entries}
    for system, state in dict.fromkeys((entry["system"], entry["state"]) for entry in entries):
        cells = []
        for task in ("hellaswag_local", "piqa_local", "blimp_local"):
            metrics = found.get((system, state, task), {})
            name = "acc_norm" if "acc_norm" in metrics else "acc"
            cells.append(f"{100 * metrics[name]:.1f} ± {100 * metrics[f'{name}_stderr']:.1f}" if metrics else "")
        lines.append(f"| {system} | {state} | {' | '.join(cells)} |")
    return "\n".join(lines)


def steps(entries: list[Entry]) -> str:
    lines = [
        "| recipe | tokens a step | dense, s | folded, s | ratio, median (quartiles) |",
        "|---|---:|---:|---:|---:|",
    ]
    for entry in sorted(entries, key=lambda e: e["ratio"]):
        low, high = entry["quartiles"]
        lines.append(
            f"| {entry['recipe']} | {entry['tokens']:,} | {entry['dense_s']:.2f} | {entry['folded_s']:.2f} | "
            f"{entry['ratio']:.2f} ({low:.2f} – {high:.2f}) |"
        )
    return "\n".join(lines)


def sections() -> dict[str, str]:
    return {
        "states": states(read("smollm2.jsonl")),
        "mixture": mixture(read("mixture.jsonl")),
        "tasks": tasks(read("tasks.jsonl")),
        "steps": steps(read("step_time.jsonl")),
    }


if __name__ == "__main__":
    write_sections(HERE / "README.md", sections())
