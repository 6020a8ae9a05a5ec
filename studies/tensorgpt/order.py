"""SmolLM2-135M's table by Kronecker products and tensor trains, its tokens in three orders: relative Frobenius errors.

    python studies/tensorgpt/order.py [KEEP …]

Without training. The shape is what the method chooses for ``keep``, the same for every order. Token counts are those of
``wikitext-2-valid`` and of ``train``, files of TENSORFOLD_DATA. Low rank, which no order changes, stands beside them.
Appends to ``order.jsonl``; what is there already is skipped.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tensorfold.algebra.contraction.apply import to_dense
from tensorfold.algebra.solvers.solve import relative_error
from tensorfold.algebra.statistics import Statistics
from tensorfold.calibration.windows import token_counts
from tensorfold.data.texts import load_text
from tensorfold.hf.sources import find_model
from tensorfold.methods import MPO, Kronecker, LowRank

LOG = Path(__file__).with_suffix(".jsonl")
KEEPS = (0.5, 0.3, 0.1)
ORDERS = ("own", "frequency", "cluster")


def methods(keeps: list[float]):
    """Structure, fraction kept, order and method, the quick ones first."""
    structures = {
        "kronecker": lambda keep, order: Kronecker(keep=keep, order=order, init="van-loan"),
        "mpo-3": lambda keep, order: MPO(keep=keep, sites=3, order=order, init="tt-svd"),
        "mpo-2": lambda keep, order: MPO(keep=keep, sites=2, order=order, init="tt-svd"),
    }
    for keep in keeps:
        yield "low-rank", keep, "own", LowRank(keep=keep)
    for structure, make in structures.items():
        for keep in keeps:
            for order in ORDERS:
                yield structure, keep, order, make(keep, order)


@cache
def table() -> Tensor:
    return find_model("smollm2-135m").model().get_input_embeddings().weight.detach().float()


@cache
def counts() -> Tensor:
    documents = load_text("wikitext-2", split="validation")
    documents += load_text(os.path.join(os.environ["TENSORFOLD_DATA"], "train"))
    return token_counts(find_model("smollm2-135m").tokenizer(), documents, len(table()))


def measure(method) -> dict[str, object]:
    weight = table()
    spec = method.spec(*weight.shape)
    given = counts() if method.token_order == "frequency" else None
    started = time.monotonic()
    factors = method.solve(weight, spec, Statistics(counts=given))
    seconds = time.monotonic() - started
    ordered = weight if factors.out_order is None else weight[factors.out_order]
    return {
        "spec": str(spec),
        "parameters": spec.parameters,
        "error": round(relative_error(ordered, to_dense(factors.cores, spec)), 5),
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    lines = LOG.read_text().splitlines() if LOG.exists() else []
    done = {(run["structure"], run["keep"], run["order"]) for run in map(json.loads, lines)}
    for structure, keep, order, method in methods([float(keep) for keep in sys.argv[1:] or KEEPS]):
        if (structure, keep, order) not in done:
            entry = {"structure": structure, "keep": keep, "order": order, **measure(method)}
            print(entry, flush=True)
            with LOG.open("a") as file:
                file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
