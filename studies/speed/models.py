"""Whole models against the dense one: reading a prompt, and generating after it.

    OMP_NUM_THREADS=2 python studies/speed/models.py [--rounds 9] [--quick]
    OMP_NUM_THREADS=2 python studies/speed/models.py --family smollm2 --dtype bfloat16 [--rounds 9]

Random weights of the real shapes. A prompt of 512 tokens and 32 tokens after it, batch size 1, all models in turn;
ratios are to the dense model of the same round. ``gpt2``: GPT-2 124M against ``krony-81m``, ``distilgpt2`` and
Krony-PT's own way, which is the same folded model with every Kronecker product multiplied out in the forward, as its
public code does; the MLP alone is timed with it at one token, too. ``smollm2``: SmolLM2-135M against all linear layers
at half their parameters by low rank, without and with pivots. Appends to
``models.jsonl`` or ``models-smollm2.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from facts import facts
from layers import SMOLLM2, folded
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

import tensorfold
from tensorfold import LowRank, Recipe, Rule
from tensorfold.benchmark.timing import Spread, interleave
from tensorfold.benchmark.whole import bench_models, set_ways

LOG = Path(__file__).with_suffix(".jsonl")
TINY = {"n_embd": 768, "n_layer": 1, "n_head": 4, "vocab_size": 500}


def gpt2(quick: bool) -> dict[str, PreTrainedModel]:
    """GPT-2 and its rivals by name."""
    config = GPT2Config(**TINY) if quick else GPT2Config()
    distil = GPT2Config(**TINY) if quick else GPT2Config(n_layer=6)
    krony = folded(config, Recipe.load("krony-81m"))
    return {
        "model": krony,
        "dense": AutoModelForCausalLM.from_config(config).eval(),
        "distilgpt2": AutoModelForCausalLM.from_config(distil).eval(),
        "materialised": krony,
    }


def smollm2(quick: bool) -> dict[str, PreTrainedModel]:
    """SmolLM2-135M and half of it by name."""
    config = LlamaConfig(**{**SMOLLM2.to_dict(), "num_hidden_layers": 1 if quick else 30})

    def half(pivots: bool) -> PreTrainedModel:
        return folded(config, Recipe((Rule("all-linear", LowRank(keep=0.5, pivots=pivots)),)))

    dense = AutoModelForCausalLM.from_config(config).eval()
    return {"low rank 0.5": half(False), "low rank 0.5 with pivots": half(True), "dense": dense}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=["gpt2", "smollm2"], default="gpt2")
    parser.add_argument("--dtype", default="float32", help="Of weights and vectors, such as bfloat16.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--log", type=Path, help="models.jsonl or models-smollm2.jsonl by default.")
    parser.add_argument("--quick", action="store_true", help="One layer and few tokens, to see that it runs.")
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype)
    torch.set_default_dtype(dtype)
    tensorfold.nn.calibrate_machine(dtype=dtype)
    rounds, prefill, decode = (1, 16, 2) if given.quick else (given.rounds, 512, 32)
    models = (gpt2 if given.family == "gpt2" else smollm2)(given.quick)
    ways = {"materialised": "materialise"} if "materialised" in models else {}
    timings = bench_models(models, ways, prefill, decode, rounds, time.perf_counter, lambda: None)
    about = {
        "family": given.family,
        "dtype": given.dtype,
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
    if ways:
        entries.append({"what": "mlp of one token", **mlp(models["model"], rounds)})
    log = given.log or (LOG if given.family == "gpt2" else LOG.with_name(f"models-{given.family}.jsonl"))
    with log.open("a") as file:
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
