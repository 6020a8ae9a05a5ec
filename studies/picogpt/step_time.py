"""A training step of ours against the public code's own (github.com/y-javanmard/mpo-picogpt), side by side.

    OMP_NUM_THREADS=2 python studies/picogpt/step_time.py --public CHECKOUT [--precision bf16] [--rounds 9]

Dense and χ = 16; 32 sequences of 256 characters, forward, backward, clipping and AdamW, same batch and threads, models
in one process, steps taken in turn. The public code trains in fp32 and has no other; ours also in bf16 autocast, as the
study does. Our AdamW is fused, as the Trainer's is. Appends medians and quartiles of the ratios to
``step_time.jsonl``. CHECKOUT lies outside this project.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from modes import recipe

import tensorfold
from tensorfold.healing.losses import cross_entropy
from tensorfold.models.picogpt import PicoGPTConfig, PicoGPTForCausalLM

LOG = Path(__file__).with_suffix(".jsonl")


def public_code(checkout: Path) -> Any:
    spec = importlib.util.spec_from_file_location("mpo_picogpt", checkout / "mpo_picogpt.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mpo_picogpt"] = module
    spec.loader.exec_module(module)
    return module


def stepper(
    model: torch.nn.Module, loss: Callable[[], torch.Tensor], fused: bool = False, bf16: bool = False
) -> Callable[[], float]:
    """A function that takes one step and returns its seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)

    def step() -> float:
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--public", type=Path, required=True, metavar="CHECKOUT")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="Of our steps.")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.manual_seed(0)
    public = public_code(args.public)
    ids, targets = torch.randint(65, (2, 32, 256))
    theirs = {"dense": public.PicoGPT(public.GPTConfig()), "mpo-16": public.MPO_PicoGPT(public.GPTConfig(), 16)}
    ours = {name: PicoGPTForCausalLM(PicoGPTConfig()).train() for name in theirs}
    tensorfold.fold(ours["mpo-16"], recipe(16, "paper", init="random"))
    for name in theirs:
        a, b = theirs[name], ours[name]
        assert sum(p.numel() for p in a.parameters()) == sum(p.numel() for p in b.parameters())
        steps = [
            stepper(a, lambda a=a: a(ids, targets)[1]),
            stepper(
                b,
                lambda b=b: cross_entropy(b(input_ids=ids, use_cache=False).logits, ids),
                fused=True,
                bf16=args.precision == "bf16",
            ),
        ]
        for step in steps * 2:
            step()
        times = [(steps[0](), steps[1]()) for _ in range(args.rounds)]
        low, middle, high = statistics.quantiles([public / own for public, own in times], n=4)
        entry = {
            "model": name,
            "our_precision": args.precision,
            "public_s": round(statistics.median(public for public, _ in times), 4),
            "ours_s": round(statistics.median(own for _, own in times), 4),
            "times_as_fast": round(middle, 2),
            "quartiles": [round(low, 2), round(high, 2)],
            "rounds": args.rounds,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        }
        print(entry, flush=True)
        with LOG.open("a") as file:
            file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
