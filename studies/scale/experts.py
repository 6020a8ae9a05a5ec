"""Experts of a small mixture at a part of their bytes: each by itself, or all of a layer in one tensor train.

    OMP_NUM_THREADS=1 python studies/scale/experts.py --model DIR [--keep F] [--only NAME …] [--heal NAME …]
    python studies/scale/experts_table.py

``DIR`` is what ``tiny_mixture.py`` wrote. Every variant folds all experts and nothing else, is calibrated on 16,384
tokens of the training part, and keeps this part of the experts' bytes, stored orders included. Perplexities are of
windows of 256 tokens; ``valid`` is what one may choose by, ``test`` what is reported. ``--heal`` trains a variant, or
``dense``, for so many steps on the training part, all in the same way. Every entry appends a line to
``experts.jsonl``; what is there is skipped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tensorfold
from tensorfold import Auto, Kronecker, LowRank, Recipe, Rule, SharedExperts
from tensorfold.data.texts import load_text
from tensorfold.models.experts import fused_experts, stacks

LOG = Path(__file__).with_name("experts.jsonl")
TOKENS, JUDGED, PROTOCOL = 16384, 24576, "disjoint-256"
ORDERS = 0.0025  # of the experts' bytes, of rows with pivots
VARIANTS: dict[str, tuple[Callable[[float], Any], bool]] = {  # method for a keep, and whether it is calibrated
    "low rank, no text": (lambda keep: LowRank(keep=keep), False),
    "low rank": (lambda keep: LowRank(keep=keep), True),
    "pivoted": (lambda keep: LowRank(keep=keep - ORDERS, pivots=True), True),
    "kronecker": (lambda keep: Kronecker(keep=keep), True),
    "train, states": (lambda keep: SharedExperts(keep=keep), True),
    "train, both": (lambda keep: SharedExperts(keep=keep, share="both"), True),
    "train, no text": (lambda keep: SharedExperts(keep=keep), False),
    "auto low": (lambda keep: Auto(keep=keep - ORDERS, effort="low"), True),
    "auto": (lambda keep: Auto(keep=keep - ORDERS), True),
}
STEPS = {
    "steps": 40,
    "batch": 8,
    "block": 256,
    "lr": 5e-4,
    "warmup": 4,
    "train": "all",
    "workers": 0,
    "evaluate_every": 40,
}


def judged(model: Any, tokenizer: Any, directory: Path) -> dict[str, float]:
    found = {}
    for part in ("valid", "test"):
        text = load_text(str(directory / f"{part}.jsonl"))
        found[part] = tensorfold.evaluate(model, tokenizer, text, PROTOCOL, max_tokens=JUDGED, batch_size=8).perplexity
    return found


def expert_bytes(model: Any) -> int:
    dense = sum(each.tensor.nbytes for each in fused_experts(model).values())
    inside = tuple(f"{name}." for name in stacks(model))
    return dense + sum(t.nbytes for name, t in model.state_dict().items() if inside and name.startswith(inside))


def made(name: str, keep: float, directory: Path, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """The dense model folded, and what is known of it."""
    model = tensorfold.load(directory / "model")
    if name == "dense":
        return model, {}
    method, calibrated = VARIANTS[name]
    started = time.process_time()
    given: tuple[Any, ...] = (tokenizer, load_text(str(directory / "train.jsonl"))) if calibrated else ()
    report = tensorfold.fold(
        model, Recipe((Rule("experts", method(keep)),)), *given, calibration_tokens=TOKENS if calibrated else None
    )
    return model, {"seconds": round(time.process_time() - started, 1), "kept": report.plan.kept}


def write(entry: dict[str, Any]) -> None:
    with LOG.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
    print(entry, flush=True)


def read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in LOG.read_text(encoding="utf-8").splitlines()] if LOG.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory that tiny_mixture.py wrote")
    parser.add_argument("--keep", type=float, default=0.5, help="part of the experts' bytes that stays")
    parser.add_argument("--only", action="append", choices=["dense", *VARIANTS])
    parser.add_argument("--heal", action="append", default=[], choices=["dense", *VARIANTS])
    args = parser.parse_args()
    torch.set_num_threads(1)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model / "model")
    done = {(entry["name"], entry["keep"], entry["steps"]) for entry in read()}
    for name in args.only or ([] if args.heal else ["dense", *VARIANTS]):
        keep = 1 if name == "dense" else args.keep
        if (name, keep, 0) not in done:
            model, known = made(name, keep, args.model, tokenizer)
            found = judged(model, tokenizer, args.model)
            write({"name": name, "keep": keep, "steps": 0, "expert_bytes": expert_bytes(model), **found, **known})
    for name in args.heal:
        keep = 1 if name == "dense" else args.keep
        if (name, keep, STEPS["steps"]) not in done:
            model, known = made(name, keep, args.model, tokenizer)
            started = time.monotonic()
            tensorfold.heal(model, str(args.model / "train.jsonl"), tokenizer=tokenizer, **STEPS)
            minutes = round((time.monotonic() - started) / 60, 1)
            found = judged(model, tokenizer, args.model)
            entry = {"name": name, "keep": keep, "steps": STEPS["steps"], "expert_bytes": expert_bytes(model), **found}
            write({**entry, **known, "minutes": minutes})


if __name__ == "__main__":
    main()
