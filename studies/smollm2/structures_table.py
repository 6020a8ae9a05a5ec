"""Write what structures.jsonl and floors.jsonl say into README.md: python studies/smollm2/structures_table.py"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from pages import write_sections

HERE = Path(__file__).parent

KINDS = ("up_proj", "gate_proj", "down_proj", "o_proj", "q_proj", "v_proj")
KEEPS = ("0.8", "0.5", "0.2")
BASES = ("as it is", "principal", "interleaved", "random")
Entries = dict[tuple[str, ...], dict[str, Any]]  # by what, kind, block and kept


def lines_of(name: str) -> list[dict[str, Any]]:
    path = HERE / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def mean(values: Iterable[float]) -> float:
    """Geometric."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def best(found: dict[str, Any], start: str) -> tuple[float, str]:
    return min((value, label) for label, value in found.items() if label.startswith(start))


def rows(entries: Entries, what: str, row: Callable[[list[dict[str, Any]]], list[str]]) -> list[str]:
    """One for every kind and size, of the entries of all blocks."""
    out = []
    for kind in KINDS:
        for keep in KEEPS:
            found = [entry for key, entry in entries.items() if (key[0], key[1], key[3]) == (what, kind, keep)]
            if found:
                out.append(f"| {kind} | {keep} | {' | '.join(row(found))} |")
    return out


def shapes(entries: Entries) -> str:
    def row(found: list[dict[str, Any]]) -> list[str]:
        cells = [f"{mean(each['low rank'] for each in found):.3f}"]
        for start in ("best plain", "best grouped", "best sum"):
            ratio = mean(best(each, start)[0] / each["low rank"] for each in found)
            cells.append(f"{ratio:.2f}, {best(found[0], start)[1].removeprefix('best ')}")
        added = [each["diagonal + low rank"] / each["low rank"] for each in found if "diagonal + low rank" in each]
        return [*cells, f"{mean(added):.3f}" if added else ""]

    blocks = sorted({int(key[2]) for key in entries if key[0] == "shapes"})
    head = [
        f"Block {', '.join(map(str, blocks))}; × the error of low rank with pivots, geometric mean over them; the "
        f"shape is that of block {next(key[2] for key in entries if key[0] == 'shapes')}.",
        "",
        "| | kept | low rank with pivots | best grouped, × | with pivots, × | low rank + grouped, × | + diagonal, × |",
        "|---|---:|---:|---|---|---|---:|",
    ]
    return "\n".join(head + rows(entries, "shapes", row))


def rotations(entries: Entries) -> str:
    def row(found: list[dict[str, Any]]) -> list[str]:
        return [f"{mean(best(each, basis)[0] / each['low rank'] for each in found):.2f}" for basis in BASES]

    head = ["| | kept | as it is | principal components | interleaved | random |", "|---|---:|---:|---:|---:|---:|"]
    return "\n".join(head + rows(entries, "rotation", row))


def heads(entries: Entries) -> str:
    out = [
        "| block | kept | apart | basis not stored | smaller heads | of size | smaller heads alone |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (what, _, block, keep), entry in sorted(entries.items(), key=lambda item: (item[0][3], item[0][2])):
        if what == "heads":
            error, label = best(entry, "heads of")
            out.append(
                f"| {block} | {keep} | {entry['apart']:.4f} | {entry['heads of 64']:.4f} | {error:.4f} | "
                f"{label.removeprefix('heads of ')} | {entry['truncation alone']:.4f} |"
            )
    return "\n".join(out)


def floors() -> str:
    out = [
        "| targets | kept | floor | third quarter | last quarter | layers at the floor | least kept | most kept |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for entry in sorted(lines_of("floors.jsonl"), key=lambda e: (e["targets"], -e["keep"], e["floor"])):
        third, last = entry["perplexity"].values()
        out.append(
            f"| {entry['targets']} | {entry['keep']} | {entry['floor']} | {third:.2f} | {last:.2f} | "
            f"{entry['at_floor']} of {entry['layers']} | {entry['least_kept']:.4f} | {entry['most_kept']:.4f} |"
        )
    return "\n".join(out)


def sections() -> dict[str, str]:
    entries = {tuple(entry["entry"].split("/")): entry for entry in lines_of("structures.jsonl")}
    return {
        "shapes": shapes(entries), "heads": heads(entries), "rotations": rotations(entries), "floors": floors()
    }  # fmt: skip


def main() -> None:
    write_sections(HERE / "README.md", sections())


if __name__ == "__main__":
    main()
