"""Peak memory of the search, step by step: python studies/scale/peaks.py MODEL [--whole] [--tokens N] [--blocks N]

Gradient moments of all layers, then error curves of the first few blocks, with one block of the model in memory, or
with ``--whole`` as the fold in memory does it. A step takes as much memory at the first blocks as at the last, so this
says in minutes what the peak of ``fold.py`` will be; it does not fold.

Prints one JSON line a step and appends it to ``peaks.jsonl``. Peaks are resident sets, less that of the process before
the model is loaded. Linux only (``/proc/self``).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers
from fold import resident

from tensorfold import Auto, Recipe, Rule
from tensorfold.benchmark.report import processor
from tensorfold.calibration.windows import calibration_windows
from tensorfold.data.texts import load_text
from tensorfold.folding import rank_search
from tensorfold.folding.budgets import searched
from tensorfold.folding.plan import carry_out, plan
from tensorfold.folding.stored_gradients import take_gradients
from tensorfold.hf.sources import find_model
from tensorfold.models.modes import evaluation_mode
from tensorfold.models.residency import WHOLE, OneBlock
from tensorfold.utils.activation_store import ActivationStore
from tensorfold.utils.distributed import Ranks
from tensorfold.utils.memory import return_large_blocks

LOG = Path(__file__).with_suffix(".jsonl")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--targets", default="mlp")
    given = parser.parse_args()
    source = find_model(given.model)
    windows = calibration_windows(source.tokenizer(), load_text("wikitext-2", split="validation"), given.tokens)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.LlamaConfig(vocab_size=8, **sizes)
    transformers.AutoModelForCausalLM.from_config(config)  # imports the model code before the baseline is taken
    before = resident("VmRSS")
    model = source.model()
    dense = sum(p.nbytes for p in model.parameters()) / 1e6
    recipe = Recipe((Rule(given.targets, Auto(keep=0.8)),))
    planned = plan(model, recipe)
    chosen = carry_out(model, recipe, planned)

    def start() -> float:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return time.monotonic()

    def note(step: str, started: float) -> None:
        peak = resident("VmHWM") - before
        entry = {
            "model": source.name, "way": "whole" if given.whole else "block by block", "step": step,
            "targets": given.targets, "tokens": windows.numel(), "dense_mb": round(dense), "before_mb": round(before),
            "peak_mb": round(peak), "ratio": round(peak / dense, 2), "seconds": round(time.monotonic() - started),
            "threads": torch.get_num_threads(), "machine": processor(),
        }  # fmt: skip
        print(json.dumps(entry), flush=True)
        with LOG.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    with tempfile.TemporaryDirectory() as folder, evaluation_mode(model), torch.no_grad():
        if not given.whole:
            return_large_blocks()
        held = nullcontext(WHOLE) if given.whole else OneBlock(model, ActivationStore(0, Path(folder)))
        with held as residency:
            budgets = searched(model, planned)
            search = rank_search.RankSearch(
                model, planned, chosen, budgets, windows, 0, Ranks(), lambda _: None, residency=residency
            )
            started = start()
            stored = take_gradients(model, windows, 0, search.members, None, residency)  # keeps their files
            search.gradients = stored.moments
            note("gradients", started)
            at_entrances = rank_search._at_entrances

            def first(*arguments: object) -> Iterator[object]:
                for index, batch in at_entrances(*arguments):
                    if index == given.blocks:
                        return
                    started = start()
                    yield index, batch
                    note(f"curves of block {index}", started)

            rank_search._at_entrances = first
            search.measure_curves()


if __name__ == "__main__":
    main()
