"""Multiple-choice tasks for SmolLM2-135M as it came and for what ``mixture.py`` healed.

    OMP_NUM_THREADS=1 python studies/heal/tasks.py --work WORK --only dense mlp-0.5-spread-mixture-72000 layers-19

``WORK`` is that of ``mixture.py``. Tasks are those of ``studies/tasks/``, run by lm-evaluation-harness (``pip install
'tensorfold[lm-eval]'``) in bfloat16: PIQA and BLiMP whole, HellaSwag's first 500 items. Skips what ``tasks.jsonl`` has.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LOG = Path(__file__).with_suffix(".jsonl")
TASKS = Path(__file__).parents[1] / "tasks"
DENSE = "smollm2-135m"
RUNS = {"piqa_local,blimp_local": [], "hellaswag_local": ["--limit", "500"]}


def entries() -> list[dict[str, Any]]:
    lines = LOG.read_text(encoding="utf-8").splitlines() if LOG.exists() else []
    return [json.loads(line) for line in lines]


def note(system: str, state: str, result: dict[str, Any]) -> None:
    """Append one line for every task of a result of ``tensorfold eval --protocol lm-eval --json``."""
    with LOG.open("a", encoding="utf-8") as file:
        for task, metrics in result["results"].items():
            entry = {"system": system, "state": state, "task": task, "text": result["text"], "metrics": metrics}
            more = {key: result[key] for key in ("parameters", "dtype", "versions")}
            file.write(json.dumps({**entry, **more}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=["dense"], help="Names of folds, or dense.")
    parser.add_argument("--state", default="96 steps, 0.00015", help="Which run of mixture.py.")
    parser.add_argument("--tasks", choices=list(RUNS), nargs="+", default=list(RUNS))
    args = parser.parse_args()
    suffix = args.state.replace(" steps", "").replace(", ", "-").replace(" ", "-")
    models = [(DENSE, "dense", "as it came")]
    models += [(str(args.work / f"healed-{system}-{suffix}"), system, args.state) for system in args.only]
    for tasks in args.tasks:
        for model, system, state in models:
            done = {entry["task"] for entry in entries() if (entry["system"], entry["state"]) == (system, state)}
            if done >= set(tasks.split(",")):
                continue
            command = ["tensorfold", "eval", model, "--protocol", "lm-eval", "--tasks", tasks, *RUNS[tasks]]
            command += ["--include-path", str(TASKS), "--dtype", "bfloat16", "--json"]
            print(" ".join(command), flush=True)
            found = subprocess.run([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True, check=True)
            note(system, state, json.loads(found.stdout))


if __name__ == "__main__":
    main()
