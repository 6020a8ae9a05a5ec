"""The demo at several sizes, logged: python studies/demo/run.py --work WORK [--size 0.97 0.94 0.9]

Each size is what ``tensorfold demo`` does, in a directory of its own below WORK; the same command goes on where it was.
A line a size goes to ``demo.jsonl``, in place of an earlier one; ``table.py`` writes the table of the README from it.
Times are of the machine that it says, on which other work may have been going on: ratios of speeds were taken in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from tensorfold.benchmark.report import processor
from tensorfold.cli.demo import order
from tensorfold.cli.pipeline import Pipeline

LOG = Path(__file__).with_name("demo.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", type=float, nargs="+", default=[0.97, 0.94, 0.9])
    parser.add_argument("--note", default="", help="What else the machine was doing.")
    given = parser.parse_args()
    for size in given.size:
        pipeline = Pipeline(dataclasses.replace(order(), size=size), given.work / str(size))
        outcome = pipeline.run()
        print(outcome)
        rows = [{k: v for k, v in dataclasses.asdict(row).items() if k != "path"} for row in outcome.rows]
        line = {
            "size": size, "rows": rows, "aim": outcome.aim, "seconds": round(pipeline.steps.seconds),
            "steps": {name: round(each, 1) for name, each in pipeline.steps.times.items()},
            "machine": processor(), "threads": torch.get_num_threads(), "note": given.note,
        }  # fmt: skip
        known = LOG.read_text(encoding="utf-8").splitlines() if LOG.exists() else []
        kept = [each for each in known if json.loads(each)["size"] != size]
        LOG.write_text("\n".join([*kept, json.dumps(line)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
