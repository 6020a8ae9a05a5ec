"""What floor the budgets of a search need: SmolLM2 at half size and below, judged by held-out text.

    OMP_NUM_THREADS=1 python studies/smollm2/floors.py [--only PATTERN …]

Each line of ``floors.jsonl`` is one fold at medium effort, as in ``run.py``: 24,000 tokens from the start of
``wikitext-2-valid``, 8,192 of them for gradients. It is judged by ``hf-1024`` on the first 8,192 tokens of the third
and of the last quarter of the same file, which neither saw. The test text has no part in it. What is there is skipped.
A floor that binds nowhere changes nothing, so a lower one is not folded again: ``same_as`` names what it equals.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import time
from pathlib import Path
from typing import Any

import tensorfold
from tensorfold import Auto, Recipe, Rule
from tensorfold.data.texts import load_text
from tensorfold.hf.sources import find_model

LOG = Path(__file__).parent / "floors.jsonl"
TOKENS = 24_000
RUNS = [
    (targets, keep, floor)
    for targets, keep in (("mlp", 0.5), ("all-linear", 0.5), ("mlp", 0.2))
    for floor in (0.5, 0.75, 0.0, 0.25)
]
QUARTERS = (2, 3)


def measure(targets: str, keep: float, floor: float) -> dict[str, Any]:
    whole = "\n\n".join(load_text("wikitext-2", split="validation"))
    source = find_model("smollm2-135m")
    model, tokenizer = source.model(), source.tokenizer()
    recipe = Recipe(fold=(Rule(targets, Auto(keep=keep, floor=floor)),))
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
        "targets": targets,
        "keep": keep,
        "floor": floor,
        "perplexity": perplexities,
        "parameters": report.parameters_after,
        "least_kept": round(min(shares.values()), 4),
        "most_kept": round(max(shares.values()), 4),
        "at_floor": sum(share < floor * keep * 1.04 for share in shares.values()),
        "layers": len(report.choices),
        "dense": sum(choice.dense for choice in report.choices.values()),
        "fold_cpu_seconds": round(spent),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="Folds whose TARGETS-KEEP-FLOOR match."
    )
    only = parser.parse_args().only
    entries = [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []
    for targets, keep, floor in RUNS:
        others = [entry for entry in entries if (entry["targets"], entry["keep"]) == (targets, keep)]
        wanted = any(fnmatch.fnmatch(f"{targets}-{keep}-{floor}", pattern) for pattern in only)
        if not wanted or any(entry["floor"] == floor for entry in others):
            continue
        same = next((e for e in others if not e["at_floor"] and e["floor"] > floor), None)
        entry = {**same, "floor": floor, "same_as": same["floor"]} if same else measure(targets, keep, floor)
        entries.append(entry)
        print(entry, flush=True)
        with LOG.open("a") as file:
            file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
