"""SmolLM2-135M's tied table by graded low rank at 2×, 3.31× and 10×, without training.

    python studies/tensorgpt/graded.py [KEEP …]

Token counts are those of ``wikitext-2-valid``, taken ten times, and of ``train``, files of TENSORFOLD_DATA; the second
moment of the final hidden states is that of the first 8,192 tokens. The settings are the method's defaults, chosen on a
held-out slice of ``wikitext-2-valid``; the test text is read once for each size. Appends to ``graded.jsonl``; what is
there already is skipped.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

import tensorfold
from tensorfold import Graded, Recipe, Rule
from tensorfold.hf.sources import find_model
from tensorfold.texts import load_text

LOG = Path(__file__).with_suffix(".jsonl")
KEEPS = (0.5, 0.3021, 0.1)
REPEATED = 10


def measure(keep: float) -> dict[str, object]:
    source = find_model("smollm2-135m")
    model, tokenizer = source.model().to(torch.float32), source.tokenizer()
    documents = load_text("wikitext-2", split="validation") * REPEATED + load_text(
        os.path.join(os.environ["TENSORFOLD_DATA"], "train")
    )
    started = time.monotonic()
    recipe = Recipe(fold=(Rule("embedding", Graded(keep=keep)),))
    report = tensorfold.fold(model, recipe, tokenizer, documents, calibration_tokens=8192)
    seconds = time.monotonic() - started
    result = tensorfold.evaluate(model, tokenizer, load_text("wikitext-2", split="test"), "hf-1024", max_tokens=8192)
    spec = next(iter(report.modules.values()))
    return {
        "keep": keep,
        "spec": str(spec),
        "table_parameters": spec.parameters,
        "parameters": report.parameters_after,
        "perplexity": result.perplexity,
        "tokens": result.tokens,
        "protocol": result.protocol,
        "text": "wikitext-2-test",
        "fold_seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    done = {json.loads(line)["keep"] for line in LOG.read_text().splitlines()} if LOG.exists() else set()
    for keep in map(float, sys.argv[1:] or KEEPS):
        if keep not in done:
            entry = measure(keep)
            print(entry, flush=True)
            with LOG.open("a") as file:
                file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
