"""Peak memory and time of one calibrated fold: python studies/scale/fold.py MODEL OUT [--whole] [--keep F] [--tokens N]

``OUT`` is written block by block (``tensorfold.fold_directory``), or with ``--whole`` by a fold of the loaded model.
``auto`` at medium effort over ``--targets`` (all-linear), calibrated on the validation split of wikitext-2.

Prints one JSON line and appends it to ``fold.jsonl``. The peak is the resident set during the fold, less that of the
process before the model is loaded; the kernel's counter is set back first. Linux only (``/proc/self``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import time
from pathlib import Path

import torch
import transformers

import tensorfold
from tensorfold import Auto, Recipe, Rule
from tensorfold.benchmark.report import processor
from tensorfold.data.texts import load_text
from tensorfold.folding.from_disk import MAX_SHARD_BYTES
from tensorfold.hf.sources import find_model

LOG = Path(__file__).with_suffix(".jsonl")


def resident(key: str) -> float:
    """Megabytes (10⁶ bytes): ``VmRSS`` now, or ``VmHWM`` at its peak."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key)) * 1024 / 1e6


def processor_seconds() -> float:
    """Processor time of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def weights_hash(directory: Path) -> str:
    """SHA-256 of all weight files together."""
    found = hashlib.sha256()
    for file in sorted(directory.glob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--targets", default="all-linear")
    given = parser.parse_args()
    source = find_model(given.model)
    path = source.path  # a GGUF file is converted here, unless it is in the cache; not a part of the fold
    documents = list(load_text("wikitext-2", split="validation"))
    tokenizer = source.tokenizer()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.LlamaConfig(vocab_size=8, **sizes)
    transformers.AutoModelForCausalLM.from_config(config)  # imports the model code before the baseline is taken
    recipe = Recipe((Rule(given.targets, Auto(keep=given.keep)),))
    before, started, used = resident("VmRSS"), time.monotonic(), processor_seconds()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    if given.whole:
        model = source.model()
        report = tensorfold.fold(model, recipe, tokenizer, documents, calibration_tokens=given.tokens)
        model.save_pretrained(given.out, max_shard_size=MAX_SHARD_BYTES)
    else:
        report = tensorfold.fold_directory(
            path, recipe, given.out, calibration=documents, calibration_tokens=given.tokens
        )
    peak = resident("VmHWM") - before
    entry = {
        "model": source.name, "way": "whole" if given.whole else "block by block", "targets": given.targets,
        "keep": given.keep, "tokens": report.calibration_tokens, "parameters": report.parameters_before,
        "dense_mb": round(report.bytes_before / 1e6), "before_mb": round(before), "peak_mb": round(peak),
        "ratio": round(peak * 1e6 / report.bytes_before, 2), "seconds": round(time.monotonic() - started),
        "processor_seconds": round(processor_seconds() - used), "weights": weights_hash(given.out),
        "parameters_after": report.parameters_after, "threads": torch.get_num_threads(), "machine": processor(),
    }  # fmt: skip
    print(json.dumps(entry), flush=True)
    with LOG.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
