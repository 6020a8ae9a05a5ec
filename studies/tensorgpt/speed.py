"""TokenMPS tables: time of a lookup, of a pass of the tied head, of the decomposition; memory of the head.

    OMP_NUM_THREADS=2 python studies/tensorgpt/speed.py [--rounds 9]

A random table of GPT-2's size, 50257 × 768, by matrix product states on 2^10, fp32. Compared are the dense table, the
folded one, and the folded one with the whole table rebuilt every time. Calls are taken in turn; ratios are of calls of
one round. Appends to ``speed.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from tensorfold.benchmark.memory import peak_of_call
from tensorfold.benchmark.timing import Spread, interleave
from tensorfold.methods import TokenMPS
from tensorfold.nn import TokenMPSEmbedding
from tensorfold.nn.token_mps import CHUNK_BYTES

LOG = Path(__file__).with_suffix(".jsonl")
VOCABULARY, WIDTH = 50_257, 768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator)
    ids = torch.randint(VOCABULARY, (1024,), generator=generator)
    states = torch.randn(64, WIDTH, generator=generator)
    for rank in (1, 4):
        started = time.perf_counter()
        table = TokenMPSEmbedding.from_dense(weight, TokenMPS(rank=rank, modes=(2,) * 10).spec(VOCABULARY, WIDTH))
        seconds = time.perf_counter() - started
        head = table.head()
        entry = {
            "rank": rank,
            "parameters": table.spec.parameters,
            "decompose_seconds": round(seconds, 2),
            "chunk_bytes": CHUNK_BYTES,
            "table_bytes": 4 * VOCABULARY * WIDTH,
            "logits_bytes": 4 * len(states) * VOCABULARY,
            "threads": torch.get_num_threads(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "torch": torch.__version__,
        }
        with torch.inference_mode():
            entry["head_peak_bytes"] = peak_of_call(lambda head=head: head(states), torch.device("cpu"))
            work = {
                "lookup of 1024 tokens": {
                    "folded": lambda table=table: table(ids),
                    "dense": lambda: F.embedding(ids, weight),
                    "rebuilt": lambda table=table: F.embedding(ids, table.to_dense()),
                },
                "logits of 64 tokens": {
                    "folded": lambda head=head: head(states),
                    "dense": lambda: F.linear(states, weight),
                    "rebuilt": lambda table=table: F.linear(states, table.to_dense()),
                },
            }
            for name, calls in work.items():
                samples = interleave(calls, rounds, time.perf_counter, lambda: None)
                entry[name] = {
                    "milliseconds": {form: round(1e3 * Spread.of(times).median, 3) for form, times in samples.items()},
                    "over folded": {
                        form: str(Spread.of([a / b for a, b in zip(times, samples["folded"], strict=True)]))
                        for form, times in samples.items()
                        if form != "folded"
                    },
                }
        print(entry, flush=True)
        with LOG.open("a") as file:
            file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
