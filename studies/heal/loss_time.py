"""Seconds of healing's loss on logits, forward and backward: term by term by autograd, and in one pass over the rows.

    OMP_NUM_THREADS=1 python studies/heal/loss_time.py

Random logits in bfloat16, as autocast leaves them, of 4 windows of 512 tokens and the vocabulary of SmolLM2-135M;
cross-entropy plus KL. The two ways in turn, one round unmeasured. Appends a line to ``loss_time.jsonl``.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorfold.healing.logit_losses import logit_losses

LOG = Path(__file__).with_suffix(".jsonl")
SHAPE = (4, 512, 49_152)
ROUNDS = 5


def term_by_term(student: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
    """The sum as autograd differentiates it."""
    entropy = F.cross_entropy(student[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    ours, theirs = (each.flatten(0, 1).float().log_softmax(-1) for each in (student, teacher))
    return entropy + F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def one_pass(student: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
    """The sum as healing computes it."""
    return logit_losses(student, labels, teacher, cross_entropy=1.0, kl=1.0)[0]


def seconds(loss: Callable[[Tensor, Tensor, Tensor], Tensor], *given: Tensor) -> float:
    given[0].grad = None
    started = time.perf_counter()
    loss(*given).backward()
    return time.perf_counter() - started


def main() -> None:
    torch.manual_seed(0)
    student, teacher = (torch.randn(SHAPE).mul_(3).bfloat16() for _ in range(2))
    labels = torch.randint(SHAPE[-1], SHAPE[:2])
    given = (student.requires_grad_(True), labels, teacher)
    ways = {"term by term": term_by_term, "one pass": one_pass}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(ROUNDS + 1):
        for name, way in ways.items():
            took = seconds(way, *given)
            if index:
                found[name].append(round(took, 3))
    ratios = [a / b for a, b in zip(*found.values(), strict=True)]
    entry = {
        "shape": SHAPE,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "seconds": found,
        "ratio": round(statistics.median(ratios), 2),
        "range": [round(min(ratios), 2), round(max(ratios), 2)],
    }
    print(entry)
    with LOG.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
