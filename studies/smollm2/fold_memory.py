"""Peak memory of folding SmolLM2-135M, calibrated: python studies/smollm2/fold_memory.py

With ``--auto``: of the search over budgets, as ``tensorfold fold --keep 0.8`` does it. With ``--embedding``: of
folding its tied embedding table at rank 284 without calibration.

Prints one JSON line and appends it to ``fold_memory.jsonl``. The peak is the resident set during load and fold, less
that of the process before the model is loaded, over the size of the dense model in memory. Linux only
(``/proc/self``).
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import torch
import transformers

import tensorfold
from tensorfold import Auto, LowRank, Recipe, Rule
from tensorfold.data.texts import load_text
from tensorfold.hf.sources import find_model

LOG = Path(__file__).with_suffix(".jsonl")


def resident(key: str) -> float:
    """Megabytes: ``VmRSS`` now, or ``VmHWM`` at its peak."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key)) / 1024


def main() -> None:
    source = find_model("smollm2-135m")
    tokenizer, documents = source.tokenizer(), load_text("wikitext-2", split="validation")
    transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )  # fmt: skip  (imports the model code before the baseline is taken)
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    model = source.model()
    dense = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    if "--embedding" in sys.argv:
        what = "embedding at rank 284, no text"
        report = tensorfold.fold(model, Recipe(fold=(Rule("embedding", LowRank(rank=284)),)))
    else:
        what = "auto at 0.8" if "--auto" in sys.argv else "low rank at 0.8"
        method = Auto(keep=0.8) if "--auto" in sys.argv else LowRank(keep=0.8)
        report = tensorfold.fold(model, method, tokenizer, documents, calibration_tokens=24_000)
    peak = resident("VmHWM") - before
    entry = {
        "what": what, "dense_mb": round(dense), "before_mb": round(before), "peak_mb": round(peak),
        "ratio": round(peak / dense, 2), "threads": torch.get_num_threads(),
        "parameters_after": report.parameters_after, "machine": platform.processor() or platform.machine(),
    }  # fmt: skip
    print(json.dumps(entry))
    with LOG.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
