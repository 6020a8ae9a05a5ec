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

    smollm2 = ROOT / "studies" / "smollm2"
    runs = {entry["run"]: entry for entry in lines(smollm2 / "runs.jsonl") if "run" in entry}
    auto = {entry["run"]: entry for entry in lines(smollm2 / "unseen.jsonl")}
    bits = lines(HERE / "bits.jsonl")
    figure, axes = plt.subplots(figsize=(7, 4))
    ours = [auto[f"{targets}-0.8-medium-wikitext-2-valid"] for targets in ("mlp", "all-linear")]
    svd = [runs[f"{name}-svd-24000-0"] for name in ("mlp-0.8", "all-linear-0.8", "mlp-0.6", "mlp-0.5")]
    for label, found, sign in (("auto, float32", ours, "o-"), ("whitened SVD, float32", svd, "s-")):
        unseen = [(run.get("test") or run["perplexity"])["tinyshakespeare"] for run in found]
        axes.plot([4 * run["parameters"] / 1e6 for run in found], unseen, sign, label=label)
    axes.plot(
        [each["bytes"] / 1e6 for each in bits], [each["perplexity"] for each in bits], "^--", label="dense, fewer bits"
    )
    for each in bits:
        axes.annotate(
            f"{each['bits']} bits", (each["bytes"] / 1e6, each["perplexity"]), (4, 6), textcoords="offset points"
        )
    axes.set(xscale="log", yscale="log", xlabel="MB of weights", ylabel="perplexity, Tiny Shakespeare")
    axes.set_xticks([75, 100, 150, 200, 300, 400, 540], labels=["75", "100", "150", "200", "300", "400", "540"])
    axes.set_xlim(75, 700)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save_picture(figure, ROOT / "docs" / "sizes.svg")


def sections() -> dict[str, str]:
    return {"the curve": curve()}


if __name__ == "__main__":
    write_sections(HERE / "README.md", sections())
    picture()
