"""Write the table of README.md and the picture of the project's README: python studies/demo/table.py"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from pages import save_picture, write_sections

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def curve() -> str:
    """A row for the dense model in each number of bits, then one for every size."""
    log = sorted(lines(HERE / "demo.jsonl"), key=lambda entry: -entry["size"])
    head = [
        "| | parameters | MB | own text | × dense | `python-docs` | × dense | prompt, × dense in 8 bits | decode | s |"
    ]
    out = [*head, "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for number, entry in enumerate(log):
        dense, eight, *_ = rows = entry["rows"]
        for row in rows if not number else rows[-1:]:
            name = row["name"] if not row["ours"] else f"{row['name']}, size {entry['size']:g}"
            speeds = [f"{row[key] / eight[key]:.2f}" for key in ("prompt", "decode")]
            out.append(
                f"| {name} | {row['parameters']:,} | {row['bytes'] / 1e6:.1f} | {row['own']:.2f} | "
                f"{row['own'] / dense['own']:.2f} | {row['unseen']:.2f} | {row['unseen'] / dense['unseen']:.2f} | "
                f"{' | '.join(speeds)} | {entry['seconds'] if row is rows[-1] else ''} |"
            )
    return "\n".join(out)


def picture() -> None:
    """Bytes against perplexity on Tiny Shakespeare: folds in float32, and the dense model in fewer bits."""
    import matplotlib.pyplot as plt

    runs = {entry["run"]: entry for entry in lines(ROOT / "studies" / "smollm2" / "runs.jsonl") if "run" in entry}
    bits = lines(HERE / "bits.jsonl")
    figure, axes = plt.subplots(figsize=(7, 4))
    for label, method, sign in (("auto (--keep)", "auto", "o-"), ("whitened SVD", "svd", "s-")):
        found = [runs[f"mlp-{keep}-{method}-24000-0"] for keep in (0.8, 0.6, 0.5)]
        axes.plot(
            [4 * run["parameters"] / 1e6 for run in found],
            [run["perplexity"]["tinyshakespeare"] for run in found],
            sign,
            label=f"{label}, float32",
        )
    axes.plot(
        [each["bytes"] / 1e6 for each in bits], [each["perplexity"] for each in bits], "^--", label="dense, fewer bits"
    )
    for each in bits:
        axes.annotate(
            f"{each['bits']} bits", (each["bytes"] / 1e6, each["perplexity"]), (4, 6), textcoords="offset points"
        )
    axes.set(xscale="log", yscale="log", xlabel="MB of weights", ylabel="perplexity, Tiny Shakespeare")
    axes.set_xticks([75, 100, 150, 200, 300, 400, 540], labels=["75", "100", "150", "200", "300", "400", "540"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save_picture(figure, ROOT / "docs" / "sizes.svg")


def sections() -> dict[str, str]:
    return {"the curve": curve()}


if __name__ == "__main__":
    write_sections(HERE / "README.md", sections())
    picture()
