"""What parts of a fold are worth on text that nobody calibrated on: SmolLM2-135M, no training.

    OMP_NUM_THREADS=1 python studies/smollm2/unseen.py [--only PATTERN …] [--list] [--save DIR]
    python studies/smollm2/unseen_table.py              # into README.md

Each run folds the dense model anew and appends a line to ``unseen.jsonl``; what is there is skipped. Choices were made
by the *selection* texts alone, which are neither what was calibrated on nor what is reported: a later part of
``wikitext-2-valid``, ``train/abc.txt`` and ``train/state_union.txt``. The *test* texts are read in the same run;
figures of earlier ablations on some of them were known when the shrinkage was chosen, and did not choose it. Unseen
ratio: geometric mean of perplexity over dense on the unseen test texts.
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
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

import tensorfold
from tensorfold import Auto, Recipe, Rule
from tensorfold.calibration.own_text import own_text
from tensorfold.data.texts import load_text
from tensorfold.hf.sources import find_model
from tensorfold.methods.auto import EFFORTS, Effort

LOG = Path(__file__).with_suffix(".jsonl")
DATA = Path(os.environ.get("TENSORFOLD_DATA", "."))
TOKENS = 24_000
OWN = 8192  # tokens that a model writes for a fold without a text
JUDGED = 8192  # tokens of each text
SELECTION = {
    "wikitext-2-valid, later": "wikitext-2-valid.txt",
    "abc": "train/abc.txt",
    "union": "train/state_union.txt",
}
UNSEEN = {"tinyshakespeare": "tinyshakespeare.txt", "lambada": "lambada-test.jsonl", "brown": "train/brown.txt"}
OLD = dataclasses.replace(EFFORTS["medium"], gradient_tokens=8192, shrink=0.0, ridge=0.0, units=False)
EFFORT: dict[str, Effort | None] = {
    "auto-0.1.0": OLD,
    "gradients": dataclasses.replace(OLD, gradient_tokens=None),
    "shrink-0.1": dataclasses.replace(OLD, gradient_tokens=None, shrink=0.1),
    "no-ridge": dataclasses.replace(EFFORTS["medium"], ridge=0.0),
    "medium": EFFORTS["medium"],
    # Gradients, and the prices with them, of a part spread over the text; fits on all of it.
    "spread": dataclasses.replace(EFFORTS["medium"], gradient_tokens=TOKENS),
    "ranks": dataclasses.replace(EFFORTS["medium"], units=False),
    "refined": dataclasses.replace(EFFORTS["medium"], refine=48),
    "plain": EFFORTS["medium"],
    # Of the versions before, not run again by this one: passes whose products handed on float32, and before that,
    # gradients of the text's own next tokens.
    "float32-passes": None,
    "empirical": None,
    "empirical-refined": None,
    "plain-refined": dataclasses.replace(EFFORTS["medium"], refine=48),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One fold and its judgement."""

    targets: str
    keep: float
    effort: str
    text: str = "wikitext-2-valid"  # or mixture, or self: what the dense model writes, or half of each: mixture+self
    tokens: int = TOKENS

    @property
    def name(self) -> str:
        tokens = "" if self.tokens == TOKENS else f"-{self.tokens}"
        return f"{self.targets}-{self.keep}-{self.effort}-{self.text}{tokens}"


def planned() -> Iterator[Run]:
    """What decides first."""
    yield Run("none", 1.0, "dense")
    for effort in ("medium", "ranks", "refined"):
        yield Run("mlp", 0.8, effort)
        yield Run("mlp", 0.5, effort)
        yield Run("all-linear", 0.8, effort)
    for effort in ("plain", "plain-refined"):
        yield Run("mlp", 0.8, effort)
        yield Run("mlp", 0.5, effort)
    yield Run("mlp", 0.8, "medium", "mixture")
    yield Run("all-linear", 0.8, "medium", "mixture")
    yield Run("mlp", 0.5, "medium", "mixture")
    yield Run("all-linear", 0.5, "medium")
    for keep in (0.8, 0.5):
        yield Run("mlp", keep, "spread", "mixture", 3 * TOKENS)
    yield Run("mlp", 0.8, "medium", "self")
    yield Run("mlp", 0.8, "medium", "self", OWN)  # a fold without a text
    yield Run("mlp", 0.5, "medium", "self")
    for tokens in (2 * TOKENS, 4 * TOKENS):
        for keep in (0.5, 0.8):
            yield Run("mlp", keep, "spread", "mixture+self", tokens)
    yield Run("mlp", 0.5, "plain", "mixture")  # half the hidden units, for studies/heal/mixture.py
    for effort in ("no-ridge", "shrink-0.1", "gradients", "auto-0.1.0"):
        yield Run("mlp", 0.8, effort)
    for keep, text in ((0.8, "wikitext-2-valid"), (0.8, "mixture"), (0.5, "mixture")):
        yield Run("mlp", keep, "float32-passes", text)
    for targets, keep, text in (
        ("mlp", 0.8, "wikitext-2-valid"),
        ("mlp", 0.5, "wikitext-2-valid"),
        ("all-linear", 0.8, "wikitext-2-valid"),
        ("mlp", 0.8, "mixture"),
    ):
        yield Run(targets, keep, "empirical", text)
    for text in ("wikitext-2-valid", "mixture"):
        yield Run("mlp", 0.8, "empirical-refined", text)


def documents(name: str) -> list[str]:
    """A text of the data directory; the calibration text's later part where it says so."""
    file = {**SELECTION, **UNSEEN}.get(name)
    if file is None:
        return load_text(str(DATA / name) if (DATA / name).exists() else name)
    found = load_text(str(DATA / file))
    return ["\n\n".join(found)[600_000:]] if name in SELECTION and "later" in name else found


def judge(model: PreTrainedModel, tokenizer: Any, names: list[str]) -> dict[str, float]:
    """Perplexity by ``hf-1024`` on the first tokens of each text."""
    return {
        name: round(tensorfold.evaluate(model, tokenizer, documents(name), "hf-1024", max_tokens=JUDGED).perplexity, 3)
        for name in names
    }


def calibration(run: Run, model: PreTrainedModel, tokenizer: Any) -> list[str] | list[list[str]]:
    """The documents that a run is calibrated on."""
    if run.text == "self":
        return own_text(model, tokenizer, run.tokens)
    if run.text == "mixture+self":
        return [documents("mixture"), own_text(model, tokenizer, run.tokens // 2)]
    return documents("mixture") if run.text == "mixture" else list(load_text("wikitext-2", split="validation"))


def measure(run: Run, save: Path | None) -> dict[str, Any]:
    """One fold and what it is judged by; the folded model goes to a directory of ``save``."""
    source = find_model("smollm2-135m")
    model, tokenizer = source.model(), source.tokenizer()
    wall, processor = time.monotonic(), time.process_time()
    parameters = {"parameters": model.num_parameters()}
    if run.effort != "dense":
        text = calibration(run, model, tokenizer)
        recipe = Recipe(fold=(Rule(run.targets, Auto(keep=run.keep, plain=run.effort.startswith("plain"))),))
        with patch.dict(EFFORTS, medium=EFFORT[run.effort]):  # type: ignore[dict-item]
            report = tensorfold.fold(model, recipe, tokenizer, text, calibration_tokens=run.tokens)
        parameters = {
            "parameters": report.parameters_after,
            "bytes": report.bytes_after,
            "units": {n: c.columns for n, c in report.choices.items() if c.columns and n.endswith("down_proj")},
            "refined": {name: list(errors) for name, errors in report.refined.items()},
        }
    spent = {"wall": round(time.monotonic() - wall), "cpu": round(time.process_time() - processor)}
    if save is not None:
        model.save_pretrained(save / run.name)
        tokenizer.save_pretrained(save / run.name)
    return {
        "run": run.name,
        **dataclasses.asdict(run),
        **parameters,
        "fold_seconds": spent,
        "threads": torch.get_num_threads(),
        "selection": judge(model, tokenizer, list(SELECTION)),
        "test": judge(model, tokenizer, ["wikitext-2-test.txt", *UNSEEN, "python-docs"]),
    }


def entries() -> dict[str, dict[str, Any]]:
    lines = LOG.read_text(encoding="utf-8").splitlines() if LOG.exists() else []
    return {entry["run"]: entry for entry in map(json.loads, lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="Runs whose names match.")
    parser.add_argument("--list", action="store_true", help="Name the runs and whether they are done.")
    parser.add_argument("--save", type=Path, metavar="DIR", help="Keep the folded models there, one directory each.")
    arguments = parser.parse_args()
    for run in planned():
        if not any(fnmatch.fnmatch(run.name, pattern) for pattern in arguments.only):
            continue
        done = run.name in entries()
        if arguments.list:
            print(f"{'done' if done else 'to do':6}{run.name}")
        elif not done and EFFORT.get(run.effort, OLD) is not None:
            entry = measure(run, arguments.save)
            print(run.name, entry["selection"], entry["fold_seconds"], flush=True)
            with LOG.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
