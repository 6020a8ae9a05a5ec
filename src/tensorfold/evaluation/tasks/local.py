"""Documents of the tasks in this folder, from ``tasks/*.jsonl`` in the directory that ``TENSORFOLD_DATA`` names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def _test(name: str) -> dict[str, Any]:
    import datasets

    file = Path(os.environ.get("TENSORFOLD_DATA", "."), "tasks", f"{name}.jsonl")
    return {"test": datasets.Dataset.from_json(str(file), keep_in_memory=True)}


def hellaswag(**_: Any) -> dict[str, Any]:
    return _test("hellaswag")


def piqa(**_: Any) -> dict[str, Any]:
    return _test("piqa")


def blimp(**_: Any) -> dict[str, Any]:
    return _test("blimp")
