"""SmolLM2-135M folded at equal size by whitened SVD and by a search over budgets: perplexity on two texts, no training.

    OMP_NUM_THREADS=1 python studies/smollm2/run.py [--only PATTERN …] [--list]
    python studies/smollm2/table.py

Each run folds the dense model anew and appends a line to ``runs.jsonl``; what is there is skipped. "svd" is
``LowRank(keep)``: every block measured behind the folded ones, whitened by its inputs, the same fraction everywhere
(SVD-LLM, arXiv 2403.07378, taken block after block). "auto" is what ``tensorfold fold --keep`` does; "auto-whole-heads"
the same without smaller value heads. All calibrate on the same tokens of ``wikitext-2-valid``, those with 0 tokens on
none; nothing was chosen by the test texts.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import tensorfold
from tensorfold import Auto, LowRank, Recipe, Rule
from tensorfold.data.texts import load_text
from tensorfold.hf.sources import find_model
from tensorfold.methods.auto import EFFORTS

HERE = Path(__file__).parent
LOG = HERE / "runs.jsonl"
DATA = Path(os.environ.get("TENSORFOLD_DATA", "."))
TOKENS = 24_000
WHOLE_HEADS = dataclasses.replace(EFFORTS["medium"], heads=False)
METHODS = {
    "svd": lambda keep: LowRank(keep=keep),
    "svd-pivots": lambda keep: LowRank(keep=keep, pivots=True),
    "auto": lambda keep: Auto(keep=keep),
    "auto-whole-heads": lambda keep: Auto(keep=keep),
    "auto-low": lambda keep: Auto(keep=keep, effort="low"),
    "auto-high": lambda keep: Auto(keep=keep, effort="high"),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """``part``: which stretch of the calibration text, 0 its beginning; another one stands for another seed."""

    targets: str
    keep: float
    method: str
    tokens: int = TOKENS
    part: int = 0

    @property
    def name(self) -> str:
        return f"{self.targets}-{self.keep}-{self.method}-{self.tokens}-{self.part}"


def planned() -> Iterator[Run]:
    """What decides first."""
    for keep in (0.8, 0.5, 0.6):
        for method in ("svd", "auto"):
            yield Run("mlp", keep, method)
    for method in ("svd", "auto"):
        yield Run("all-linear", 0.8, method)
    for method in ("svd-pivots", "auto-low"):
        yield Run("mlp", 0.8, method)
    for tokens in (8_192, 72_000, 200_000):
        for method in ("svd", "auto"):
            yield Run("mlp", 0.8, method, tokens)
    for part in (1, 2):
        for method in ("svd", "auto"):
            yield Run("mlp", 0.8, method, part=part)
    for method in ("auto-whole-heads", "auto"):
        yield Run("v_proj+o_proj", 0.5, method)
    yield Run("all-linear", 0.8, "auto-whole-heads")
    for method in ("svd", "auto-whole-heads", "auto"):
        yield Run("all-linear", 0.5, method)
    for method in ("svd", "auto"):
        yield Run("mlp", 0.8, method, tokens=0)
    yield Run("mlp", 0.8, "auto-high")


def calibration(part: int) -> list[str]:
    """The validation text from its part-th quarter on."""
    whole = "\n\n".join(load_text("wikitext-2", split="validation"))
    return [whole[len(whole) * part // 4 :]]


def measure(run: Run) -> dict[str, Any]:
    source = find_model("smollm2-135m")
    model, tokenizer = source.model(), source.tokenizer()
    recipe = Recipe(fold=(Rule(run.targets.split("+"), METHODS[run.method](run.keep)),))
    wall, processor = time.monotonic(), time.process_time()
    medium = EFFORTS["medium"] if run.method != "auto-whole-heads" else WHOLE_HEADS
    with patch.dict(EFFORTS, medium=medium):
        if run.tokens:
            report = tensorfold.fold(model, recipe, tokenizer, calibration(run.part), calibration_tokens=run.tokens)
        else:
            report = tensorfold.fold(model, recipe)
    wall, processor = time.monotonic() - wall, time.process_time() - processor
    perplexities = {}
    for name, text in (("wikitext-2-test", load_text("wikitext-2")), ("tinyshakespeare", _plain("tinyshakespeare"))):
        result = tensorfold.evaluate(model, tokenizer, text, "hf-1024", max_tokens=8192)
        perplexities[name] = round(result.perplexity, 3)
    return {
        "run": run.name,
        **dataclasses.asdict(run),
        "perplexity": perplexities,
        "parameters": report.parameters_after,
        "kept": round(report.plan.kept, 6),
        "fold_seconds": round(wall),
        "fold_cpu_seconds": round(processor),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "threads": torch.get_num_threads(),
        "ranks": {name: list(spec.ranks) for name, spec in report.modules.items()} if report.choices else None,
        "specs": {name: str(spec) for name, spec in report.modules.items() if name.endswith(("v_proj", "o_proj"))},
    }


def _plain(name: str) -> list[str]:
    return load_text(str(DATA / f"{name}.txt"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="Runs whose names match.")
    parser.add_argument("--list", action="store_true", help="Name the runs and whether they are done.")
    arguments = parser.parse_args()
    done = {json.loads(line)["run"] for line in LOG.read_text().splitlines()} if LOG.exists() else set()
    for run in planned():
        if not any(fnmatch.fnmatch(run.name, pattern) for pattern in arguments.only):
            continue
        if arguments.list:
            print(f"{'done' if run.name in done else 'to do':6}{run.name}")
        elif run.name not in done:
            entry = measure(run)
            print(entry["run"], entry["perplexity"], entry["fold_seconds"], flush=True)
            with LOG.open("a") as file:
                file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
