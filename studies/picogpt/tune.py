"""Choose the tuned schedule of the dense PicoGPT, and of healing, on the training text's own held-out tail.

    OMP_NUM_THREADS=1 python studies/picogpt/tune.py --work WORK [--only PATTERN]

The study's validation text (the last 10 %) is cut off first; of what is left the last 10 % judge. Appends a line to
``tune.jsonl`` for each candidate; what is there already is skipped. Trials are shorter than the study's runs.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from modes import recipe
from run import CALIBRATION, COMMON, HEALING, training_text

import tensorfold
from tensorfold.healing.heal import heal
from tensorfold.models.picogpt import PicoGPTConfig, PicoGPTForCausalLM, character_tokenizer

LOG = Path(__file__).with_suffix(".jsonl")
# name -> (steps, settings of healing, configuration)
CANDIDATES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    f"lr {lr:g}, {rows}": (200, {"lr": lr}, {"embedding_std": size} if size != 0.02 else {})
    for rows, size in (("token rows of size 1", 1.0), ("token rows of size .02", 0.02))
    for lr in (3e-3, 6e-3, 1e-2, 1e-3, 3e-4)
} | {
    # Short trials favour high rates, so the two best are compared over more steps.
    f"lr {lr:g}, token rows of size 1, 600 steps": (600, {"lr": lr}, {"embedding_std": 1.0})
    for lr in (6e-3, 1e-2)
}


# Healing of χ = 16, folded from a dense model of 600 steps at the best rate: its peak learning rate, and whether the
# fold is calibrated.
HEALING_STEPS = 150
HEALING_CANDIDATES = {f"healing, lr {lr:g}": (lr, False) for lr in (1e-2, 5e-3, 2e-3, 1e-3, 2e-2, 4e-2)} | {
    "healing, lr 0.02, calibrated fold": (2e-2, True)
}
BEST = "lr 0.01, token rows of size 1, 600 steps"


def training_part(text: Path, work: Path) -> tuple[Path, Any]:
    """The text without the study's validation text, and the tokenizer of the whole."""
    whole = text.read_text(encoding="utf-8")
    part = work / "training-part.txt"
    part.write_text(training_text(whole), encoding="utf-8")
    return part, character_tokenizer(whole)


def trial(name: str, text: Path, work: Path) -> dict[str, Any]:
    started = time.monotonic()
    part, tokenizer = training_part(text, work)
    out = work / "best" if name == BEST else None
    if name in HEALING_CANDIDATES:
        if not (work / "best").exists():
            trial(BEST, text, work)
        model, teacher = tensorfold.load(work / "best"), tensorfold.load(work / "best")
        lr, calibrated = HEALING_CANDIDATES[name]
        texts = [part.read_text("utf-8")] if calibrated else None
        tensorfold.fold(model, recipe(16), tokenizer, texts, calibration_tokens=CALIBRATION if texts else None)
        out, configuration = None, CANDIDATES[BEST][2]
        settings = {**COMMON, **HEALING, "lr": lr, "steps": HEALING_STEPS}
    else:
        steps, training, configuration = CANDIDATES[name]
        torch.manual_seed(0)
        model, teacher = PicoGPTForCausalLM(PicoGPTConfig(**configuration)), None
        settings = {**COMMON, "warmup": steps // 10, **training, "steps": steps}
    settings["evaluate_every"] = settings["steps"]
    report = heal(model, part, teacher, tokenizer=tokenizer, out=out, **settings)
    return {
        "candidate": name,
        "loss": report.validation_loss,
        "settings": settings,
        "configuration": configuration,
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("TENSORFOLD_DATA", "."))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--text", type=Path, default=data / "tinyshakespeare.txt")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="Candidates whose names match.")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    tried = {json.loads(line)["candidate"] for line in LOG.read_text().splitlines()} if LOG.exists() else set()
    for name in [*CANDIDATES, *HEALING_CANDIDATES]:
        if name not in tried and fnmatch.fnmatch(name, arguments.only):
            entry = trial(name, arguments.text, arguments.work)
            print(entry, flush=True)
            with LOG.open("a") as file:
                file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
