"""Write the tables of README.md and the pictures from the logs: python studies/speed/table.py"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib.pyplot as plt
from pages import save_picture, write_sections

HERE = Path(__file__).parent

SLOWEST = 1 / 1.05  # times as fast as the dense layer
DRAWN = {
    "krony-81m": "Kronecker (768, 768)",
    "krony-67m": "Kronecker (64, 32)",
    "krony-80m-2": "two Kronecker products",
    "krony-92m-4": "four Kronecker products",
    "demo": "low rank, kept 0.8",
    "pivots-0.8": "low rank with pivots, kept 0.8",
}
Entry = dict[str, Any]


def read(name: str) -> list[Entry]:
    path = HERE / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def layers(entries: list[Entry]) -> str:
    counts = [point["tokens"] for point in entries[0]["tokens"]]
    lines = [
        f"| recipe | layer | {' | '.join(map(str, counts))} | least, matrix held | least, training |",
        f"|---|---|{'---:|' * len(counts)}---:|---:|",
    ]
    for entry in entries:
        cells = [marked(point["speedup"]["dense"]["median"]) for point in entry["tokens"]]
        for kind in ("held", "training"):
            points = entry[kind]
            cells.append(marked(min(point["speedup"]["median"] for point in points)) if points else "")
        lines.append(f"| {entry['system']} | {entry['kind']} {entry['spec']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def marked(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio >= SLOWEST else f"*{ratio:.2f}*"


def rivals(entries: list[Entry]) -> str:
    lines = ["| layer | tokens | way | tensorfold | tensorly-torch | pyfastkron |", "|---|---:|---|---:|---:|---:|"]
    for entry in entries:
        for point in entry["tokens"]:
            times = {name: spread["median"] for name, spread in point["seconds"].items()}
            cells = [f"{times['dense'] / times[name]:.2f}" if name in times else "" for name in
                     ("model", "tensorly-torch", "pyfastkron")]  # fmt: skip
            lines.append(f"| {entry['spec']} | {point['tokens']} | {point['way']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def int8(entries: list[Entry]) -> str:
    lines = [
        "| form | bytes | share | perplexity | decode, tokens a second | time over dense fp32 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for entry in entries:
        lines.append(
            f"| {entry['form']} | {entry['bytes']:,} | {entry['share']:.3f} | {entry['perplexity']:.2f} | "
            f"{entry['decode_tokens_per_second']:.1f} | {entry['time_over_dense']} |"
        )
    return "\n".join(lines)


def models(entries: list[Entry]) -> str:
    names = {
        "model": "krony-81m",
        "distilgpt2": "DistilGPT2",
        "materialised": "krony-81m, products multiplied out in the forward (Krony-PT's way)",
    }
    found = {(entry["what"], entry.get("system")): entry for entry in entries}
    lines = ["| | parameters | prefill | decode |", "|---|---:|---:|---:|"]
    for system, name in names.items():
        prefill, decode = found["prefill", system], found["decode", system]
        times = [entry["times_as_fast"].replace("–", " – ") for entry in (prefill, decode)]
        lines.append(f"| {name} | {prefill['parameters']:,} | {' | '.join(times)} |")
    return "\n".join(lines)


def models_smollm2(entries: list[Entry]) -> str:
    found = {(entry["dtype"], entry["system"], entry["what"]): entry for entry in entries}
    lines = [
        "| | parameters | dtype | prompt, tokens a second | × | after it, tokens a second | × |",
        "|---|---:|---|---:|---|---:|---|",
    ]
    for dtype, system in dict.fromkeys(key[:2] for key in found):
        prompt, after = found[dtype, system, "prefill"], found[dtype, system, "decode"]
        speeds = [
            f"{entry['tokens'] / entry['seconds']['median']:,.0f} | {entry['times_as_fast'].replace('–', ' – ')}"
            for entry in (prompt, after)
        ]
        lines.append(f"| {system} | {prompt['parameters']:,} | {dtype} | {' | '.join(speeds)} |")
    return "\n".join(lines)


def layers_bfloat16(entries: list[Entry]) -> str:
    tokens = [point["tokens"] for point in entries[0]["tokens"]]
    lines = [f"| layer, out × in | kept | {' | '.join(map(str, tokens))} |", "|---|---:|" + "---:|" * len(tokens)]
    for entry in entries:
        rows, columns = (math.prod(entry[f"{side}_modes"]) for side in ("out", "in"))
        ratios = [f"{point['speedup']['dense']['median']:.2f}" for point in entry["tokens"]]
        lines.append(f"| {rows} × {columns} | {entry['system'].removeprefix('pivots-')} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def draw_layers(entries: list[Entry]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for side, direction in zip(axes, ("up", "down"), strict=True):
        for system, label in DRAWN.items():
            found = [e for e in entries if e["system"] == system and e["count"] > 1 and shape(e) == direction]
            if found:
                tokens = [point["tokens"] for point in found[0]["tokens"]]
                ratios = [point["speedup"]["dense"]["median"] for point in found[0]["tokens"]]
                side.plot(tokens, ratios, "o-", label=label)
        side.axhline(1, color="grey", linewidth=0.8)
        side.set(xscale="log", yscale="log", xlabel="tokens", title=f"MLP, {direction}")
        side.set_xticks(tokens, labels=map(str, tokens))
    axes[0].set_ylabel("times as fast as nn.Linear")
    axes[0].legend(fontsize="small")
    save_picture(figure, HERE / "layers.svg")


def shape(entry: Entry) -> str:
    rows, columns = 1, 1
    for m, n in zip(entry["out_modes"], entry["in_modes"], strict=True):
        rows, columns = rows * m, columns * n
    return "up" if rows > 2 * columns else "down" if columns > 2 * rows else "square"


def draw_fits(entries: list[Entry]) -> None:
    figure, side = plt.subplots(figsize=(6, 4))
    kinds: dict[str, list[tuple[int, float]]] = {"Kronecker, half the parameters": [], "low rank, half": []}
    for entry in entries:
        if entry["what"] == "fit":
            kind = next(iter(kinds)) if "⊗" in entry["spec"] else "low rank, half"
            kinds[kind].append((entry["width"], entry["processor_seconds"]))
    for label, points in kinds.items():
        side.plot(*zip(*sorted(points), strict=True), "o-", label=label)
    side.set(xscale="log", yscale="log", xlabel="width (matrix 4·width × width)", ylabel="processor seconds")
    ticks = sorted({width for points in kinds.values() for width, _ in points})
    side.set_xticks(ticks, labels=map(str, ticks))
    side.legend()
    save_picture(figure, HERE / "fits.svg")


def sections() -> dict[str, str]:
    forms = {
        "layers": layers,
        "layers-bfloat16": layers_bfloat16,
        "rivals": rivals,
        "int8": int8,
        "models": models,
        "models-smollm2": models_smollm2,
    }
    return {name: form(read(name)) for name, form in forms.items() if read(name)}


def main() -> None:
    write_sections(HERE / "README.md", sections())
    draw_layers(read("layers"))
    draw_fits(read("fold_scale"))


if __name__ == "__main__":
    main()
