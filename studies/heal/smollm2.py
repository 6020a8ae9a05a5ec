"""Heal SmolLM2-135M's folded MLP within an hour on two cores, and measure it before, between and after.

    OMP_NUM_THREADS=2 python studies/heal/smollm2.py --keep 0.8 --work WORK

Runs the commands it prints, each of which goes on where it was if it is started again:

1. fold, data-aware low rank, on 24,000 tokens of ``wikitext-2-valid``;
2. heal block by block on 65,536 tokens of ``train`` and ``wikitext-2-valid``, two passes;
3. heal end to end on ``wikitext-2-valid``: cross-entropy and distillation from the dense model, a step of 1,024 tokens;
4. evaluate on ``wikitext-2-test``, and on ``tinyshakespeare``, which none of them has seen.

Texts are files of ``TENSORFOLD_DATA``. Appends to ``smollm2.jsonl`` and keeps each twentieth line of the logs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LOG = HERE / "smollm2.jsonl"
DENSE = "smollm2-135m"


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


def measure(model: object, what: str, keep: float, **more: Any) -> None:
    done = [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []
    if any((entry["what"], entry["keep"]) == (what, keep) for entry in done):
        return
    found = {}
    for text in ("wikitext-2", "tinyshakespeare"):
        result, _ = tensorfold("eval", model, "--text", text, "--protocol", "hf-1024", "--max-tokens", 8192)
        found[text] = {key: result[key] for key in ("perplexity", "tokens", "protocol", "text")}
    entry = {"what": what, "keep": keep, "parameters": result["parameters"], **found, **more}
    with LOG.open("a") as file:
        file.write(json.dumps(entry) + "\n")
    print(entry, flush=True)


def thin(directory: Path, target: Path) -> None:
    lines = [json.loads(line) for line in (directory / "heal.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["step"] % 20 == 0 or "validation_loss" in line]
    target.write_text("".join(json.dumps(line) + "\n" for line in kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=240, help="End to end.")
    args = parser.parse_args()
    data, keep = Path(os.environ["TENSORFOLD_DATA"]), args.keep
    args.work.mkdir(parents=True, exist_ok=True)
    folded, blocks, healed = (args.work / f"{name}-{keep}" for name in ("folded", "blocks", "healed"))
    teacher = ["--teacher", DENSE, "--set", "precision=bf16"]

    if keep == 0.8:
        measure(DENSE, "dense", 1.0)
    if not folded.exists():
        recipe = args.work / f"low-rank-{keep}.yaml"
        rule = {"targets": "mlp", "method": "low-rank", "keep": keep}
        recipe.write_text(json.dumps({"fold": [rule], "calibrate": {"text": "wikitext-2", "tokens": 24_000}}))
        tensorfold("fold", DENSE, "--recipe", recipe, "--out", folded)
    measure(folded, "folded", keep)
    _, first = tensorfold(
        "heal", folded, "--train", data / "train", "--train", data / "wikitext-2-valid.txt", *teacher, "--steps", 0,
        "--blockwise-tokens", 65_536, "--set", "blockwise_epochs=2", "--set", "blockwise_batch=1", "--out", blocks,
    )  # fmt: skip
    measure(blocks, "block by block", keep, **first)
    thin(blocks, HERE / f"smollm2-{keep}-blocks.jsonl")
    _, second = tensorfold(
        "heal", blocks, "--train", data / "wikitext-2-valid.txt", *teacher, "--steps", args.steps, "--batch", 2,
        "--block", 512, "--lr", 1.5e-4, "--set", "kl=1", "--set", "warmup=20", "--set", "train=all-but-embeddings",
        "--set", f"evaluate_every={args.steps // 2}", "--set", "validation_fraction=0.1", "--out", healed,
    )  # fmt: skip
    measure(healed, "end to end", keep, **second)
    thin(healed, HERE / f"smollm2-{keep}-end-to-end.jsonl")


if __name__ == "__main__":
    main()
