"""A second model: the dense PicoGPT of studies/picogpt, folded by whitened SVD and by the search, no training.

    python studies/picogpt/run.py --work WORK --only 'tuned-dense-0-random-0'      # trains it, 13 minutes
    python studies/smollm2/second_model.py WORK/tuned-dense-0-random-0

A character model of 808,448 parameters, trained here on the first 90 % of Tiny Shakespeare, of which the first 65,536
characters calibrate; the last 10 % judge, in windows of 256 (``disjoint-256``). Appends to ``second_model.jsonl``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import tensorfold
from tensorfold import Auto, LowRank, Recipe, Rule
from tensorfold.hf.sources import find_model

TOKENS = 65_536


def main() -> None:
    log = Path(__file__).with_name("second_model.jsonl")
    text = (Path(os.environ["TENSORFOLD_DATA"]) / "tinyshakespeare.txt").read_text(encoding="utf-8")
    train, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    source = find_model(sys.argv[1])
    methods = {"svd": LowRank, "auto": Auto}
    for targets, keep, name in [("", 1.0, "dense")] + [
        (targets, keep, name) for targets in ("mlp", "all-linear") for keep in (0.8, 0.6, 0.5) for name in methods
    ]:
        model, tokenizer = source.model(), source.tokenizer()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        if targets:
            recipe = Recipe(fold=(Rule(targets, methods[name](keep=keep)),))
            report = tensorfold.fold(model, recipe, tokenizer, [train], calibration_tokens=TOKENS)
            parameters = report.parameters_after
        result = tensorfold.evaluate(model, tokenizer, [held_out], "disjoint-256")
        entry = {
            "targets": targets, "keep": keep, "method": name, "parameters": parameters,
            "perplexity": round(result.perplexity, 4), "accuracy": round(result.accuracy, 4), "tokens": result.tokens,
        }  # fmt: skip
        print(entry, flush=True)
        with log.open("a") as file:
            file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
