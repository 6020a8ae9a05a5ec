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
from run import COMMON

from tensorfold.healing.run import heal
from tensorfold.picogpt import PicoGPTConfig, PicoGPTForCausalLM, character_tokenizer

LOG = Path(__file__).with_suffix(".jsonl")
# name -> (steps, settings of healing, configuration)
CANDIDATES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    f"lr {lr:g}, {rows}": (200, {"lr": lr}, {"embedding_std": size} if size != 0.02 else {})
    for rows, size in (("token rows of size 1", 1.0), ("token rows of size .02", 0.02))
    for lr in (3e-3, 6e-3, 1e-2, 1e-3, 3e-4)
}


def trial(name: str, text: Path, work: Path) -> dict[str, Any]:
    started = time.monotonic()
    steps, training, configuration = CANDIDATES[name]
    whole = text.read_text(encoding="utf-8")
    blocks = len(whole) // 256
    training_part = work / "training-part.txt"
    training_part.write_text(whole[: (blocks - int(blocks * 0.1)) * 256], encoding="utf-8")
    tokenizer = character_tokenizer(whole)
    torch.manual_seed(0)
    model = PicoGPTForCausalLM(PicoGPTConfig(**configuration))
    settings = {**COMMON, "warmup": steps // 10, "evaluate_every": steps, **training, "steps": steps}
    report = heal(model, training_part, tokenizer=tokenizer, **settings)
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
    for name in CANDIDATES:
        if name not in tried and fnmatch.fnmatch(name, arguments.only):
            entry = trial(name, arguments.text, arguments.work)
            print(entry, flush=True)
            with LOG.open("a") as file:
                file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
