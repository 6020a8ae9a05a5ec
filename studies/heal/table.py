"""Write the tables of README.md from the logs: python studies/heal/table.py"""

from __future__ import annotations

import json
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
    return {"states": states(read("smollm2.jsonl")), "steps": steps(read("step_time.jsonl"))}


if __name__ == "__main__":
    write_sections(HERE / "README.md", sections())
