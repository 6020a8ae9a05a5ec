"""The Krony-PT study: which start, how many terms, scalars, α, pruning, permutations; and the layer-dropped rival.

    python studies/krony/base.py --out BASE
    python studies/krony/run.py --base BASE --work WORK [--jobs 2] [--seeds 0 1 2]
    python studies/krony/table.py

Every run folds BASE, heals it with the same budget of steps and tokens, and appends one line to ``runs.jsonl``; a run
that is there already is skipped, and one that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tensorfold import Kronecker, LowRank, Recipe, Rule

HERE = Path(__file__).parent
RUNS = HERE / "runs.jsonl"
TEXTS = ["train", "tinyshakespeare"]
CALIBRATION_TOKENS = 8192
HEAL: dict[str, Any] = {
    "steps": 60, "batch": 8, "block": 256, "lr": 6e-4, "warmup": 5, "schedule": "cosine", "validation_fraction": 0.003,
    "weight_decay": 0.0, "betas": (0.9, 0.95), "clip": 1.0, "train": "all",
}  # fmt: skip

QUARTER, HALF, SMALL = (192, 192), (384, 192), (192, 48)  # the (768, 768), (1536, 768) and (768, 192) of width 192


def kronecker(factor: tuple[int, int], **settings: Any) -> Recipe:
    return Recipe(fold=(Rule("mlp", Kronecker(factor=factor, **settings)),))


# name -> (question, recipe, calibrated). Within a question all have the same number of parameters to 0.3 %.
SYSTEMS: dict[str, tuple[str, Recipe, bool]] = {
    "van-loan": ("quarter", kronecker(QUARTER, init="van-loan"), False),
    "normalized": ("quarter", kronecker(QUARTER, init="normalized"), False),
    "random": ("quarter", kronecker(QUARTER, init="random"), False),
    "data-aware": ("quarter", kronecker(QUARTER, init="data-aware"), True),
    "van-loan, scalars": ("quarter", kronecker(QUARTER, init="van-loan", scalars=True), False),
    "normalized, scalars": ("quarter", kronecker(QUARTER, init="normalized", scalars=True), False),
    "van-loan, hidden order": ("quarter", kronecker(QUARTER, init="van-loan", permute="hidden"), False),
    "van-loan, all orders": ("quarter", kronecker(QUARTER, init="van-loan", permute="all"), False),
    "data-aware, hidden order": ("quarter", kronecker(QUARTER, init="data-aware", permute="hidden"), True),
    "4 terms, van-loan": ("quarter", kronecker(SMALL, terms=4, init="van-loan"), False),
    "4 terms, data-aware": ("quarter", kronecker(SMALL, terms=4, init="data-aware"), True),
    "low rank, data-aware": ("quarter", Recipe(fold=(Rule("mlp", LowRank(rank=38)),)), True),
    "not folded, all 6 layers": ("dense", Recipe(fold=(), layers=(0, 1, 2, 3, 4, 5)), False),
    "3 of 6 layers": ("quarter", Recipe(fold=(), layers=(0, 2, 5)), False),
    "half: van-loan": ("half", kronecker(HALF, init="van-loan"), False),
    "half: normalized": ("half", kronecker(HALF, init="normalized"), False),
    "half: prune, ε = 0": ("half", kronecker(HALF, init="prune"), False),
    "half: prune, ε = 0.1": ("half", kronecker(HALF, init="prune", epsilon=0.1), False),
    "half: data-aware": ("half", kronecker(HALF, init="data-aware"), True),
}


def one_run(base: Path, work: Path, system: str, seed: int) -> dict[str, Any]:
    import torch

    import tensorfold
    from tensorfold.data.texts import load_text
    from tensorfold.data.token_cache import TokenCache
    from tensorfold.healing.heal import heal
    from tensorfold.hf.sources import find_model

    torch.set_num_threads(1)
    started = time.monotonic()
    question, recipe, calibrated = SYSTEMS[system]
    source = find_model(str(base))
    model, tokenizer = source.model(), source.tokenizer()
    calibration = load_text("wikitext-2", split="validation") if calibrated else None
    report = tensorfold.fold(model, recipe, tokenizer, calibration, calibration_tokens=CALIBRATION_TOKENS)
    cache = TokenCache.build(TEXTS, tokenizer, 256, validation_fraction=HEAL["validation_fraction"])
    held_out = tokenizer.decode(torch.cat([cache.validation[k]["input_ids"] for k in range(48)]))
    texts = {"held-out": [held_out], "wikitext-2-test": load_text("wikitext-2", split="test")}

    def perplexities() -> dict[str, float]:
        return {
            name: tensorfold.evaluate(model, tokenizer, text, "disjoint-256", max_tokens=8192).perplexity
            for name, text in texts.items()
        }

    before = perplexities()
    slug = "".join(c if c.isalnum() else "-" for c in system)
    result = heal(model, [Path(t) for t in TEXTS], tokenizer=tokenizer, out=work / f"{slug}-{seed}", seed=seed, **HEAL)
    return {
        "system": system,
        "question": question,
        "seed": seed,
        "parameters_before": report.parameters_before,
        "parameters": report.parameters_after,
        "mean_error": sum(report.errors.values()) / len(report.errors) if report.errors else None,
        "before": before,
        "after": perplexities(),
        "tokens": result.tokens,
        "settings": HEAL,
        "protocol": "disjoint-256, first 8,192 tokens",
        "seconds": round(time.monotonic() - started, 1),
    }


def done() -> set[tuple[str, int]]:
    if not RUNS.exists():
        return set()
    return {(run["system"], run["seed"]) for run in map(json.loads, RUNS.read_text().splitlines())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), metavar="SYSTEM")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at a time, one thread each.")
    parser.add_argument("--one", nargs=2, metavar=("SYSTEM", "SEED"), help="Do this run only.")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        entry = one_run(arguments.base, arguments.work, arguments.one[0], int(arguments.one[1]))
        with RUNS.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        return
    waiting = [(s, seed) for seed in arguments.seeds for s in arguments.systems if (s, seed) not in done()]
    running: list[subprocess.Popen[bytes]] = []
    while waiting or running:
        running = [process for process in running if process.poll() is None]
        while waiting and len(running) < arguments.jobs:
            system, seed = waiting.pop(0)
            print(f"{time.strftime('%H:%M:%S')} {system}, seed {seed}; {len(waiting)} to go", flush=True)
            command = [sys.executable, __file__, "--base", arguments.base, "--work", arguments.work]
            running.append(
                subprocess.Popen(
                    [*map(str, command), "--one", system, str(seed)], env={**os.environ, "OMP_NUM_THREADS": "1"}
                )
            )
        time.sleep(1)


if __name__ == "__main__":
    main()
