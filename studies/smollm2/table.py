"""Write the tables of README.md and the pictures from runs.jsonl: python studies/smollm2/table.py"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib.pyplot as plt
from pages import save_picture, write_sections

HERE = Path(__file__).parent

NAMES = {
    "svd": "whitened SVD, block after block",
    "svd-pivots": "the same, with pivots",
    "auto-low": "auto, effort low",
    "auto": "auto",
    "auto-whole-heads": "auto, whole value heads",
    "auto-high": "auto, effort high",
}
TEXTS = ("wikitext-2-test", "tinyshakespeare")
HEALED = HERE.parent / "heal" / "smollm2.jsonl"  # measured the dense model by the same protocol and texts
DENSE = next(
    {result["text"]: result["perplexity"] for result in entry.values() if isinstance(result, dict)}
    for entry in map(json.loads, HEALED.read_text().splitlines())
    if entry["what"] == "dense"
)
Run = dict[str, Any]


def table(runs: list[Run]) -> str:
    lines = [
        "| targets | kept | method | tokens | from quarter | parameters | wikitext-2-test | × dense | × SVD | "
        "tinyshakespeare | × dense | × SVD | processor time |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    base = {key(run): run["perplexity"] for run in runs if run["method"] == "svd"}
    for run in sorted(runs, key=lambda r: (r["targets"] != "mlp", -r["keep"], r["part"], r["tokens"], -spent(r))):
        cells = []
        for text in TEXTS:
            value = run["perplexity"][text]
            rival = base.get(key(run), {}).get(text)
            cells += [f"{value:.2f}", f"{value / DENSE[text]:.2f}"]
            cells.append(f"{value / rival:.3f}" if rival and run["method"] != "svd" else "")
        lines.append(
            f"| {run['targets']} | {run['keep']} | {NAMES[run['method']]} | {run['tokens']:,} | {run['part']} | "
            f"{run['parameters']:,} | {' | '.join(cells)} | {run['fold_cpu_seconds'] / 60:.1f} min |"
        )
    return "\n".join(lines)


def second(rows: list[Run]) -> str:
    dense = next(row for row in rows if row["method"] == "dense")
    lines = [
        "| targets | kept | whitened SVD | parameters | auto | parameters | × SVD | accuracy, SVD | auto |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        f"| dense | 1.0 | {dense['perplexity']:.3f} | {dense['parameters']:,} | | | | {dense['accuracy']:.1%} | |",
    ]
    pairs = [(svd, auto) for svd in rows for auto in rows if (svd["method"], auto["method"]) == ("svd", "auto")]
    for svd, auto in pairs:
        if (svd["targets"], svd["keep"]) == (auto["targets"], auto["keep"]):
            ratio = auto["perplexity"] / svd["perplexity"]
            lines.append(
                f"| {svd['targets']} | {svd['keep']} | {svd['perplexity']:.3f} | {svd['parameters']:,} | "
                f"**{auto['perplexity']:.3f}** | {auto['parameters']:,} | {ratio:.3f} | "
                f"{svd['accuracy']:.1%} | {auto['accuracy']:.1%} |"
            )
    return "\n".join(lines)


def key(run: Run) -> tuple[Any, ...]:
    return run["targets"], run["keep"], run["tokens"], run["part"]


def spent(run: Run) -> float:
    return float(run["perplexity"]["wikitext-2-test"])


def calibration(runs: list[Run]) -> None:
    """Perplexity against calibration tokens, MLP kept 0.8."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for side, text in zip(axes, TEXTS, strict=True):
        for method, style in (("svd", "x--"), ("auto", "o-")):
            points = sorted(
                (run["tokens"], run["perplexity"][text])
                for run in runs
                if (run["targets"], run["keep"], run["method"], run["part"]) == ("mlp", 0.8, method, 0)
            )
            side.plot(*zip(*points, strict=True), style, label=NAMES[method])
        side.axhline(DENSE[text], color="grey", linewidth=0.8, label="dense")
        side.set(xscale="log", yscale="log", xlabel="calibration tokens", title=text)
    axes[0].set_ylabel("perplexity (hf-1024)")
    axes[0].legend()
    save_picture(figure, HERE / "calibration.svg")


def ranks(runs: list[Run]) -> None:
    """Ranks that the search gave, by block, MLP kept 0.8."""
    run = next(r for r in runs if r["run"] == "mlp-0.8-auto-24000-0")
    figure, side = plt.subplots(figsize=(8, 3.6))
    for kind in ("gate_proj", "up_proj", "down_proj"):
        found = {int(re.search(r"\.(\d+)\.", name)[1]): r[0] for name, r in run["ranks"].items() if kind in name}  # type: ignore[index]
        side.plot(*zip(*sorted(found.items()), strict=True), "o-", label=kind)
    side.axhline(335, color="grey", linewidth=0.8, label="low rank without pivots, equal shares")
    side.set(xlabel="block", ylabel="rank (of 576)")
    side.legend()
    save_picture(figure, HERE / "ranks.svg")


def read(name: str) -> list[Run]:
    return [json.loads(line) for line in (HERE / name).read_text().splitlines()]


def sections() -> dict[str, str]:
    return {"tables": table(read("runs.jsonl")), "second model": second(read("second_model.jsonl"))}


def main() -> None:
    write_sections(HERE / "README.md", sections())
    runs = read("runs.jsonl")
    calibration(runs)
    ranks(runs)


if __name__ == "__main__":
    main()
