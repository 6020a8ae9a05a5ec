"""Write the table of README.md from the log of experts.py: python studies/scale/experts_table.py"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from pages import write_sections

HERE = Path(__file__).parent


def experts(entries: list[dict[str, Any]]) -> str:
    """A row for every variant, beside the dense model that was trained for as many steps."""
    found = {(entry["name"], entry["keep"], entry["steps"]): entry for entry in entries}
    whole = found[("dense", 1, 0)]["expert_bytes"]
    lines = [
        "| experts | of their bytes | healed | valid | test | × dense, test | processor seconds of the fold |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (name, _, steps), entry in sorted(found.items(), key=lambda each: (-each[0][1], each[0][2], each[1]["test"])):
        dense = found.get(("dense", 1, steps))
        cells = [
            name,
            f"{entry['expert_bytes'] / whole:.3f}",
            f"{steps} steps" if steps else "",
            f"{entry['valid']:.2f}",
            f"{entry['test']:.2f}",
            "" if dense is None else f"{entry['test'] / dense['test']:.3f}",
            f"{entry['seconds']:.0f}" if "seconds" in entry else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sections() -> dict[str, str]:
    lines = (HERE / "experts.jsonl").read_text(encoding="utf-8").splitlines()
    return {"experts": experts([json.loads(line) for line in lines])}


if __name__ == "__main__":
    write_sections(HERE / "README.md", sections())
