"""Write the tables of what was measured into README.md: python studies/engines/table.py"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from pages import write_sections

LOG, ROUNDING = (Path(__file__).with_name(name) for name in ("run.jsonl", "rounding.jsonl"))


def table() -> str:
    """Markdown: what is in the log, by engine and bits."""
    heads = "model|engine|bits|computed in|folded|MB, dense|MB, folded|of dense|prompt, tok/s|×|steps, tok/s|×"
    rows = [f"| {heads.replace('|', ' | ')} |", "|---|---|---:|---|---|---:|---:|---:|---|---|---|---|"]
    lines = LOG.read_text(encoding="utf-8").splitlines() if LOG.exists() else []
    for entry in map(json.loads, lines):
        fold = {"low-rank": "all linear, low rank", "units": "half of the hidden units"}[entry["fold"]]
        fold += "" if entry["multiple"] == 1 else f", multiples of {entry['multiple']}"
        size = {form: stored / 1e6 for form, stored in entry["bytes"].items()}
        speed = {
            what: " → ".join(f"{many / entry['seconds'][form][what]['median']:,.0f}" for form in ("dense", "folded"))
            for what, many in (("prompt", 512), ("step", 1))
        }
        cells = [
            entry["model"],
            entry["engine"],
            str(entry["bits"]),
            "its own choice" if entry["engine"] == "llama.cpp" else entry.get("dtype", "float32"),
            fold,
            f"{size['dense']:.1f}",
            f"{size['folded']:.1f}",
            f"{size['folded'] / size['dense']:.2f}",
            speed["prompt"],
            entry["times_as_fast"]["prompt"],
            speed["step"],
            entry["times_as_fast"]["step"],
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def rounding() -> str:
    """Markdown: perplexities of folded graphs by bits, with factors rounded one by one and together."""
    rows = [
        "| folded | bits | factors rounded | MB | python-docs | Tiny Shakespeare |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for entry in map(json.loads, ROUNDING.read_text(encoding="utf-8").splitlines()):
        size = "" if entry["bytes"] is None else f"{entry['bytes'] / 1e6:.1f}"
        texts = " | ".join(f"{entry['perplexity'][text]:.2f}" for text in ("python-docs", "tinyshakespeare"))
        rows.append(f"| {entry['model']} | {entry['bits']} | {entry['rounded'] or ''} | {size} | {texts} |")
    return "\n".join(rows)


def sections() -> dict[str, str]:
    return {"engines": table(), "rounding": rounding()}


if __name__ == "__main__":
    write_sections(Path(__file__).with_name("README.md"), sections())
