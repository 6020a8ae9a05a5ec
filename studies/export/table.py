"""Write the table of README.md from the log: python studies/export/table.py"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from pages import write_sections

HERE = Path(__file__).parent
NAMES = {
    "krony-81m": ("GPT-2, dense", "krony-81m"),
    "smollm2-mlp-0.5": ("SmolLM2-135M, dense", "MLP at half the size, low rank"),
}


def speed(entries: list[dict[str, Any]]) -> str:
    counts = sorted({entry["tokens"] for entry in entries})
    lines = [
        f"| | parameters | MB | {' | '.join(f'{count} tokens' for count in counts)} |",
        f"|---|---:|---:|{'---:|' * len(counts)}",
    ]
    for model, (dense, folded) in NAMES.items():
        mine = sorted((entry for entry in entries if entry["model"] == model), key=lambda e: e["tokens"])
        times = [f"1 ({1000 * entry['seconds']['dense']['median']:.0f} ms)" for entry in mine]
        ratios = [entry["times_as_fast"].replace("–", " – ") for entry in mine]
        for form, name, cells in (("dense", dense, times), ("folded", folded, ratios)):
            first = mine[0]
            lines.append(
                f"| {name} | {first['parameters'][form]:,} | {first['bytes'][form] / 1e6:.1f} | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def sections() -> dict[str, str]:
    log = HERE / "onnx_speed.jsonl"
    return {"speed": speed([json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()])}


if __name__ == "__main__":
    write_sections(HERE / "README.md", sections())
