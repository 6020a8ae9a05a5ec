"""GPT-2 124M against ``krony-81m``, ``distilgpt2`` and Krony-PT's own way: reading a prompt, and generating after it.

    OMP_NUM_THREADS=2 python studies/speed/models.py [--rounds 9] [--quick]

Random float32 weights of the real shapes. A prompt of 512 tokens and 32 tokens after it, batch size 1, all models in
turn; ratios are to the dense GPT-2 of the same round. Krony-PT's way is the same folded model with every Kronecker
product multiplied out in the forward, as its public code does; the MLP alone is timed with it at one token, too.
Appends to ``models.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from facts import facts
from layers import folded
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

import tensorfold
from tensorfold import Recipe
from tensorfold.benchmark.timing import Spread, interleave
from tensorfold.benchmark.whole import bench_models, set_ways

LOG = Path(__file__).with_suffix(".jsonl")
TINY = {"n_embd": 768, "n_layer": 1, "n_head": 4, "vocab_size": 500}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--log", type=Path, default=LOG)
    parser.add_argument("--quick", action="store_true", help="One layer and few tokens, to see that it runs.")
    given = parser.parse_args()
    tensorfold.nn.calibrate_machine()
    rounds, prefill, decode = (1, 16, 2) if given.quick else (given.rounds, 512, 32)
    config = GPT2Config(**TINY) if given.quick else GPT2Config()
    distil = GPT2Config(**TINY) if given.quick else GPT2Config(n_layer=6)
    krony = folded(config, Recipe.load("krony-81m"))
    models = {
        "model": krony,
        "dense": AutoModelForCausalLM.from_config(config).eval(),
        "distilgpt2": AutoModelForCausalLM.from_config(distil).eval(),
        "materialised": krony,
    }
    timings = bench_models(
        models, {"materialised": "materialise"}, prefill, decode, rounds, time.perf_counter, lambda: None
    )
    about = {
        "rounds": rounds,
        **facts(),
    }
    entries: list[dict[str, Any]] = []
    for what, timing in zip(("prefill", "decode"), timings, strict=True):
        assert timing is not None
        dense = timing.samples["dense"]
        for name, samples in timing.samples.items():
            ratio = Spread.of([d / s for d, s in zip(dense, samples, strict=True)])
            parameters = models[name].num_parameters()
            seconds = Spread.of(samples).to_dict()
            entries.append({"what": what, "system": name, "tokens": timing.tokens, "parameters": parameters,
                            "seconds": seconds, "times_as_fast": str(ratio)})  # fmt: skip
    entries.append({"what": "mlp of one token", **mlp(krony, rounds)})
    with given.log.open("a") as file:
        for entry in entries:
            print(entry, flush=True)
            file.write(json.dumps({**entry, **about}) + "\n")


@torch.inference_mode()
def mlp(model: PreTrainedModel, rounds: int) -> dict[str, Any]:
    """One MLP of the folded model against the same with its products multiplied out in the forward."""
    block = model.get_submodule("transformer.h.0.mlp")
    x = torch.randn(1, 1, 768)

    def call(way: str | None) -> None:
        set_ways(block, way)
        block(x)

    calls = {"model": lambda: call(None), "materialised": lambda: call("materialise")}
    samples = interleave(calls, rounds, time.perf_counter, lambda: None)
    set_ways(block, None)
    ratios = [b / a for a, b in zip(samples["model"], samples["materialised"], strict=True)]
    return {"tokens": 1, "times_as_fast_as_materialised": str(Spread.of(ratios))}


if __name__ == "__main__":
    main()
