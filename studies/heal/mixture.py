"""Heal SmolLM2-135M folded on ``mixture`` text, and the dense model alike, judged on text that neither has seen.

    OMP_NUM_THREADS=1 python studies/smollm2/unseen.py --only mlp-0.8-medium-mixture --save FOLDS
    OMP_NUM_THREADS=1 python studies/heal/mixture.py --folds FOLDS --work WORK --only dense mlp-0.8-medium-mixture

Systems are folds that ``studies/smollm2/unseen.py --save`` left, by name, and the dense model. Each is trained with
cross-entropy and distillation from the dense model on random windows of ``mixture``, a step of 2,048 tokens. The
control is the dense model, healed with the same text, steps, rate and teacher. Weights are chosen by held-out windows
of ``mixture``. Unseen ratio as in ``studies/smollm2/unseen.py``. Every command goes on where it was if it is started
again; appends to ``mixture.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LOG = Path(__file__).with_suffix(".jsonl")
DENSE = "smollm2-135m"
TOKENS = 8192  # of each text that is judged
TEXTS = {
    "wikitext-2-test": "wikitext-2-test.txt",
    "tinyshakespeare": "tinyshakespeare.txt",
    "lambada": "lambada-test.jsonl",
    "brown": "train/brown.txt",
    "python-docs": None,
}
UNSEEN = [name for name in TEXTS if name != "wikitext-2-test"]
SETTINGS = {"kl": 1, "warmup": 20, "train": "all-but-embeddings", "precision": "bf16", "windows": "random"}


def tensorfold(*arguments: object) -> tuple[dict[str, Any], dict[str, float]]:
    """Run one command with ``--json``; its object, and its seconds of wall clock and of processor."""
    command = ["tensorfold", *map(str, arguments), "--json"]
    print(" ".join(command), flush=True)
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    times = {"seconds": round(time.monotonic() - started, 1), "processor_seconds": round(processor, 1)}
    return json.loads(result.stdout), times


def entries() -> dict[tuple[str, str], dict[str, Any]]:
    lines = LOG.read_text(encoding="utf-8").splitlines() if LOG.exists() else []
    return {(entry["system"], entry["state"]): entry for entry in map(json.loads, lines)}


def unseen_ratio(entry: dict[str, Any]) -> float:
    """Geometric mean of perplexity over the dense model's as it came, on the texts that nothing has seen."""
    dense = entries()["dense", "as it came"]["perplexity"]
    return math.exp(sum(math.log(entry["perplexity"][name] / dense[name]) for name in UNSEEN) / len(UNSEEN))


def measure(model: object, system: str, state: str, **more: Any) -> None:
    if (system, state) in entries():
        return
    data, found, result = Path(os.environ["TENSORFOLD_DATA"]), {}, {}
    for name, file in TEXTS.items():
        text = name if file is None else data / file
        result, _ = tensorfold("eval", model, "--text", text, "--protocol", "hf-1024", "--max-tokens", TOKENS)
        found[name] = round(result["perplexity"], 4)
    entry = {"system": system, "state": state, "parameters": result["parameters"], "perplexity": found, **more}
    with LOG.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
    print(entry, "unseen ratio", round(unseen_ratio(entry), 4), flush=True)


def swept(healed: Path) -> dict[str, Any]:
    """The rate that a sweep chose, and the validation loss after the short run with each; nothing if there was none."""
    lines = map(json.loads, (healed / "heal.jsonl").read_text(encoding="utf-8").splitlines())
    return next(({"lr": line["lr"], "sweep": line["losses"]} for line in lines if line.get("stage") == "sweep"), {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--folds", type=Path, help="Where the folds are.")
    parser.add_argument("--only", nargs="+", default=["dense"], help="Names of folds, or dense.")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--lr", type=float, nargs="+", default=[1.5e-4], help="Several are tried for each system.")
    parser.add_argument("--seed", type=int, default=0, help="Of the windows' order.")
    args = parser.parse_args()
    mixture = Path(os.environ["TENSORFOLD_DATA"]) / "mixture"
    args.work.mkdir(parents=True, exist_ok=True)
    measure(DENSE, "dense", "as it came")
    for system in args.only:
        start = DENSE if system == "dense" else args.folds / system
        if system != "dense":
            measure(start, system, "folded")
        rates = " ".join(f"{rate:g}" for rate in args.lr)
        state = f"{args.steps} steps, {rates}" + (f", seed {args.seed}" if args.seed else "")
        out = args.work / f"healed-{system}-{state.replace(' steps', '').replace(', ', '-').replace(' ', '-')}"
        rate = {"lr": args.lr[0]} if len(args.lr) == 1 else {"lr_sweep": args.lr}
        settings = {**SETTINGS, "seed": args.seed, **rate}
        options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        report, took = tensorfold(
            "heal", start, "--train", mixture, "--teacher", DENSE, "--steps", args.steps, "--batch", 4, "--block", 512,
            *options, "--set", f"evaluate_every={max(1, args.steps // 3)}", "--out", out,
        )  # fmt: skip
        losses = {key: report[key] for key in ("validation_loss_before", "validation_loss", "step")}
        measure(out, system, state, **took, **losses, **swept(out))


if __name__ == "__main__":
    main()
