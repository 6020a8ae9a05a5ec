"""What floor the budgets of a search need: SmolLM2's MLP at half size, judged by held-out calibration text.

    OMP_NUM_THREADS=1 python studies/smollm2/floors.py

Each line of ``floors.jsonl`` is one fold at medium effort, as in ``run.py``: 24,000 tokens from the start of
``wikitext-2-valid``, 8,192 of them for gradients. It is judged by ``hf-1024`` on the first 8,192 tokens of the third
and of the last quarter of the same file, which neither saw. The test text has no part in it. What is there is skipped.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import tensorfold
from tensorfold import Auto, Recipe, Rule
from tensorfold.hf.sources import find_model
from tensorfold.texts import load_text

LOG = Path(__file__).parent / "floors.jsonl"
KEEP, TOKENS = 0.5, 24_000
FLOORS = (0.5, 0.0, 0.25, 0.75)
QUARTERS = (2, 3)


def measure(floor: float) -> dict[str, Any]:
    whole = "\n\n".join(load_text("wikitext-2", split="validation"))
    source = find_model("smollm2-135m")
    model, tokenizer = source.model(), source.tokenizer()
    recipe = Recipe(fold=(Rule("mlp", Auto(keep=KEEP, floor=floor)),))
    started = time.process_time()
    report = tensorfold.fold(model, recipe, tokenizer, [whole], calibration_tokens=TOKENS)
    spent = time.process_time() - started
    perplexities = {}
    for quarter in QUARTERS:
        text = [whole[len(whole) * quarter // 4 :]]
        result = tensorfold.evaluate(model, tokenizer, text, "hf-1024", max_tokens=8192)
        perplexities[str(quarter)] = round(result.perplexity, 3)
    shares = {
        name: choice.parameters / report.plan.modules[name].dense_parameters
        for name, choice in report.choices.items()
        if not choice.dense
    }
    return {
        "floor": floor,
        "keep": KEEP,
        "perplexity": perplexities,
        "parameters": report.parameters_after,
        "least_kept": round(min(shares.values()), 4),
        "most_kept": round(max(shares.values()), 4),
        "at_floor": sum(share < floor * KEEP * 1.01 for share in shares.values()),
        "layers": len(report.choices),
        "dense": sum(choice.dense for choice in report.choices.values()),
        "fold_cpu_seconds": round(spent),
    }


def main() -> None:
    done = {json.loads(line)["floor"] for line in LOG.read_text().splitlines()} if LOG.exists() else set()
    for floor in FLOORS:
        if floor not in done:
            entry = measure(floor)
            print(entry, flush=True)
            with LOG.open("a") as file:
                file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
