"""SmolLM2-135M's tied table by every structure: perplexity at equal parameters, plain and fitted to text, then healed.

    OMP_NUM_THREADS=1 python studies/tensorgpt/smollm2.py --work WORK [--only PATTERN …] [--list]
    OMP_NUM_THREADS=1 python studies/tensorgpt/smollm2.py --work WORK --long [--only PATTERN …]
    python studies/tensorgpt/table.py

The table is 49152 × 576, a fifth of the model, and is the output head as well; in the runs that are named "untied" the
head stays as it is, a matrix of its own. "Plain" knows the table alone; "text" is
fitted to calibration text: counts of tokens from ``wikitext-2-valid``, taken ten times, and ``train``; gradients and
hidden states of its first 8,192 tokens (``--long``: 16,384). Both are then healed for a few steps on
``wikitext-2-valid`` with the dense model as teacher, the table alone trained. ``--long`` heals the whole model of the
graded tables, within 20 minutes of processor time each. Nothing was chosen by the test texts. Each run appends a line
to ``smollm2.jsonl`` or ``long.jsonl``; what is there is skipped.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import tensorfold
from tensorfold import MPO, Graded, Kronecker, LowRank, Recipe, Rule, TokenMPS
from tensorfold.data.texts import load_text
from tensorfold.hf.sources import find_model

HERE = Path(__file__).parent
DATA = Path(os.environ.get("TENSORFOLD_DATA", "."))
SIZES = {"2x": 1 / 2, "3.31x": 1 / 3.31, "10x": 1 / 10, "38.4x": 1 / 38.4}
LOW_RANKS = {1: 18, 4: 191, 6: 343}  # of a low rank of the table that has the size of the chains, by their rank
CALIBRATION_TOKENS = {"text": 8192, "text-16k": 16_384, "text-24k": 24_000}
LONG_CALIBRATION_TOKENS, REPEATED = 16_384, 10
COMMON: dict[str, Any] = {
    "batch": 2, "block": 512, "windows": "random", "kl": 1.0, "precision": "bf16",
}  # fmt: skip
SHORT = {**COMMON, "steps": 8, "lr": 1e-3, "warmup": 2, "train": "cores", "validation_fraction": 0.0}
LONG = {
    **COMMON, "steps": 60, "lr": 1.5e-4, "warmup": 10, "train": "all", "validation_fraction": 0.05, "select": "last",
    "evaluate_every": 1000,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    structure: str
    size: str
    fit: str  # plain, or a key of CALIBRATION_TOKENS
    method: Any
    untied: bool = False  # whether the head stays dense, as a matrix of its own

    @property
    def name(self) -> str:
        return f"{self.structure}-{self.size}-{self.fit}" + "-untied" * self.untied


def planned() -> Iterator[Run]:
    yield Run("dense", "1x", "plain", None)
    # More text; the exponent is the better one on the last fifth of wikitext-2-valid, counts taken without that.
    yield Run("graded", "10x", "text-24k", Graded(keep=SIZES["10x"]))
    yield Run("graded", "10x", "text-16k", Graded(keep=SIZES["10x"], exponent=0.85))
    for size, keep in SIZES.items():
        for fit in ("text", "plain"):
            yield Run("graded", size, fit, Graded(keep=keep))
            yield Run("low-rank", size, fit, LowRank(keep=keep))
    for rank in (1, 2, 4, 6):
        yield Run("token-mps", f"r={rank}", "plain", TokenMPS(rank=rank, modes=(2, 2, 2, 2, 2, 2, 3, 3)))
    for size, keep in SIZES.items():
        for fit in ("text", "plain"):
            yield Run("mpo", size, fit, MPO(keep=keep, sites=2, order="cluster"))
            yield Run("kronecker", size, fit, Kronecker(keep=keep, order="cluster"))
    for rank in (1, 4, 6):  # the head stays dense; beside each, low rank of its size
        chains = TokenMPS(rank=rank, modes=(2, 2, 2, 2, 2, 2, 3, 3))
        yield Run("token-mps", f"r={rank}", "plain", chains, untied=True)
        yield Run("low-rank", f"as r={rank}", "plain", LowRank(rank=LOW_RANKS[rank]), untied=True)


def folded(run: Run, calibration_tokens: int) -> tuple[Any, Any, dict[str, Any]]:
    """The model, its tokenizer, and what the fold did."""
    source = find_model("smollm2-135m")
    model, tokenizer = source.model().to(torch.float32), source.tokenizer()
    if run.method is None:
        return model, tokenizer, {"spec": "dense", "table_parameters": 49_152 * 576, "parameters": 134_515_008}
    documents = None
    if run.fit != "plain":
        documents = load_text("wikitext-2", split="validation") * REPEATED + load_text(str(DATA / "train"))
    started = time.process_time()
    recipe = Recipe(fold=(Rule("embedding", run.method),), untie=run.untied)
    report = tensorfold.fold(model, recipe, tokenizer, documents, calibration_tokens=calibration_tokens or None)
    spec = next(iter(report.modules.values()))
    return model, tokenizer, {
        "spec": str(spec),
        "table_parameters": spec.parameters,
        "parameters": report.parameters_after,
        "fold_cpu_seconds": round(time.process_time() - started, 1),
    }  # fmt: skip


def perplexities(model: Any, tokenizer: Any, texts: tuple[str, ...]) -> dict[str, float]:
    """By ``hf-1024`` on the first 8,192 tokens of each text."""
    out = {}
    for text in texts:
        documents = load_text(text, split="test") if text == "wikitext-2" else load_text(str(DATA / f"{text}.txt"))
        result = tensorfold.evaluate(model, tokenizer, documents, "hf-1024", max_tokens=8192)
        out[text] = round(result.perplexity, 3)
    return out


def measure(run: Run, work: Path, long: bool) -> dict[str, Any]:
    texts = ("wikitext-2", "tinyshakespeare") if long else ("wikitext-2",)
    settings = LONG if long else SHORT
    tokens = LONG_CALIBRATION_TOKENS if long else CALIBRATION_TOKENS.get(run.fit, 0)
    model, tokenizer, done = folded(run, tokens)
    before = perplexities(model, tokenizer, texts)
    teacher = find_model("smollm2-135m").model().to(torch.float32)
    if run.method is None:  # the control: the dense model trained just so
        settings = {**settings, "train": "all"}
    started = time.process_time()
    out = work / run.name if long else None
    tensorfold.heal(model, DATA / "wikitext-2-valid.txt", teacher, tokenizer=tokenizer, out=out, **settings)
    seconds = time.process_time() - started
    return {
        "run": run.name,
        **{key: value for key, value in dataclasses.asdict(run).items() if key != "method"},
        "method": str(run.method),
        **done,
        "before": before,
        "after": perplexities(model, tokenizer, texts),
        "healing_cpu_seconds": round(seconds, 1),
        "settings": settings,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="Directory for checkpoints of the long runs.")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="Runs whose names match.")
    parser.add_argument("--long", action="store_true", help="Heal the whole model of the graded tables.")
    parser.add_argument("--list", action="store_true", help="Name the runs and whether they are done.")
    arguments = parser.parse_args()
    log = HERE / ("long.jsonl" if arguments.long else "smollm2.jsonl")
    done = {json.loads(line)["run"] for line in log.read_text().splitlines()} if log.exists() else set()
    runs = [run for run in planned() if any(fnmatch.fnmatch(run.name, pattern) for pattern in arguments.only)]
    if arguments.long:
        graded = [f"graded-{size}-text" for size in SIZES if size != "38.4x"]
        runs = [run for run in runs if run.name in (*graded, "dense-1x-plain")]
    for run in runs:
        if arguments.list:
            print(f"{'done' if run.name in done else 'to do':6}{run.name}")
        elif run.name not in done:
            entry = measure(run, arguments.work, arguments.long)
            print(entry, flush=True)
            with log.open("a") as file:
                file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
