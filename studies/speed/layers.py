"""Every folded layer of the shipped recipes against the dense one: forward, and forward with backward.

    OMP_NUM_THREADS=2 python studies/speed/layers.py [--only PATTERN] [--rounds 9] [--quick]
    python studies/speed/table.py

Models of GPT-2's, PicoGPT's and SmolLM2's shapes with random float32 weights, folded to random cores: only shapes
matter here. Layers of equal shape are timed once, whichever recipes have them, at 1, 16, 128, 1024 and 4096 tokens, in
turn with the ``nn.Linear`` or ``nn.Embedding`` of the same size; linear layers also with their matrix held between
forwards (``tensorfold.nn.cache_matrices``), and in training. Those as large as a vocabulary have fewer rounds, and
beyond 128 tokens their forward alone is timed. The ways are chosen by the speeds of this machine, which are measured
first (``tensorfold.nn.calibrate_machine``). Appends to ``layers.jsonl``; layers that are there are skipped.

With ``--rivals`` the forward is also timed with the libraries that apply the same operators, where they are installed;
their threads may slow down the rest, so that goes to ``rivals.jsonl``.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from facts import facts
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel

import tensorfold
from tensorfold import LowRank, Recipe, Rule
from tensorfold.benchmark.layers import Group, bench_layer, groups
from tensorfold.benchmark.rivals import installed
from tensorfold.benchmark.timing import Spread, interleave
from tensorfold.folding.plan import prepare
from tensorfold.hf.modules import empty_module, swap
from tensorfold.models.picogpt import PicoGPTConfig
from tensorfold.nn import MPOLinear
from tensorfold.recipes.recipe import shipped_recipes

LOG = Path(__file__).with_suffix(".jsonl")
TOKENS = (1, 16, 128, 1024, 4096)
VOCABULARY = 2**24  # numbers
DISTILGPT2 = "tensorgpt-distilgpt2"

# Of SmolLM2-135M, two layers; the others have the same shapes.
SMOLLM2 = LlamaConfig(
    vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9,
    num_key_value_heads=3, tie_word_embeddings=True,
)  # fmt: skip


def systems() -> Iterator[tuple[str, PreTrainedConfig, Recipe]]:
    """What is folded: a name, the model's configuration, the recipe."""
    for name in shipped_recipes():
        recipe = Recipe.load(name)
        if name.startswith("picogpt"):
            yield name, PicoGPTConfig(vocab_size=65), recipe
        elif recipe.model is None or "smollm2" in recipe.model:
            yield name, SMOLLM2, recipe
        else:
            yield name, GPT2Config(n_layer=6 if name == DISTILGPT2 else 12), recipe
    for keep in (0.8, 0.5):  # what a search mostly chooses
        yield f"pivots-{keep}", SMOLLM2, Recipe((Rule("all-linear", LowRank(keep=keep, pivots=True)),))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="Systems whose names match.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--log", type=Path, default=LOG)
    parser.add_argument("--rivals", action="store_true", help="Beside tensorly-torch and pyfastkron, if installed.")
    parser.add_argument("--dtype", default="float32", help="Of weights and vectors, such as bfloat16; its own log.")
    parser.add_argument("--quick", action="store_true", help="One system, few tokens, to see that it runs.")
    given = parser.parse_args()
    rivals, versions = installed() if given.rivals else ([], [])
    log = LOG.with_name("rivals.jsonl") if given.rivals and given.log == LOG else given.log
    if given.dtype != "float32" and log == LOG:
        log = LOG.with_name(f"layers-{given.dtype}.jsonl")
    dtype = getattr(torch, given.dtype)
    torch.set_default_dtype(dtype)
    tensorfold.nn.calibrate_machine(dtype=dtype)
    tokens, most = ((1, 16), 1) if given.quick else (TOKENS, given.rounds)
    done = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    seen = {(entry["kind"], entry["spec"], entry["bias"], entry["parameters"]) for entry in done}
    for name, config, recipe in systems():
        if not fnmatch.fnmatch(name, "picogpt-mpo-16" if given.quick else given.only):
            continue
        for group in groups(folded(config, recipe), None):
            module, spec = group.module, group.module.spec
            key = (type(module).__name__, str(spec), getattr(module, "bias", None) is not None, spec.parameters)
            if key in seen:
                continue
            seen.add(key)
            large = spec.dense_parameters >= VOCABULARY
            few, rounds = (tokens[:3], min(most, 3)) if large else (tokens, most)
            layer, notes = bench_layer(group, tokens, rounds, time.perf_counter, rivals, False, lambda: None)
            entry = {"system": name, "rounds": rounds, **facts(), **layer.to_dict(), "notes": [*versions, *notes]}
            if not rivals:
                entry |= {"held": held(group, few, rounds), "training": trained(group, few, rounds)}
            with log.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            ratios = {point.timing.tokens: str(point.timing.speedup["dense"]) for point in layer.points}
            print(name, layer.kind, layer.spec, ratios, flush=True)


def folded(config: PreTrainedConfig, recipe: Recipe) -> PreTrainedModel:
    """A model with random weights, and random cores where the recipe folds."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    plan, matrices = prepare(model, recipe)
    for name, matrix in matrices.items():
        module = empty_module(matrix, plan.modules[name]).to_empty(device="cpu")
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.02)
        for kind, order in module.named_buffers():
            order.copy_(
                torch.randperm(len(order)) if kind in ("in_order", "out_position") else torch.arange(len(order))
            )
        swap(model, matrix, module)
    return model


@torch.inference_mode()
def held(group: Group, tokens: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """A linear layer that may keep its matrix between forwards, where it is the faster way, against the dense one."""
    module = group.module
    if not isinstance(module, MPOLinear):
        return []
    dense = nn.Linear(module.in_features, module.out_features, module.bias is not None)
    module.hold_matrix(True)
    found = []
    for count in tokens:
        x = torch.randn(count, module.in_features)
        calls = {"model": _forward(module, x), "dense": _forward(dense, x)}
        found.append(_compared(count, interleave(calls, rounds, time.perf_counter, lambda: None)))
    module.hold_matrix(False)
    return found


def trained(group: Group, tokens: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """Forward and backward of a linear layer and of the dense one: seconds of each, and how many times as fast."""
    module = group.module
    if not isinstance(module, MPOLinear):
        return []
    dense = nn.Linear(module.in_features, module.out_features, module.bias is not None)
    found = []
    for count in tokens:
        x = torch.randn(count, module.in_features)
        back = torch.randn(count, module.out_features)
        calls = {"model": _step(module, x, back), "dense": _step(dense, x, back)}
        found.append(_compared(count, interleave(calls, rounds, time.perf_counter, lambda: None)))
    return found


def _compared(tokens: int, samples: Mapping[str, list[float]]) -> dict[str, Any]:
    ratios = [dense / model for model, dense in zip(samples["model"], samples["dense"], strict=True)]
    seconds = {name: Spread.of(values).median for name, values in samples.items()}
    return {"tokens": tokens, "seconds": seconds, "speedup": Spread.of(ratios).to_dict()}


def _forward(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: layer(x)


def _step(layer: nn.Module, x: Tensor, back: Tensor) -> Callable[[], None]:
    def step() -> None:
        layer.zero_grad(set_to_none=True)
        layer(x.detach().requires_grad_()).backward(back)

    return step


if __name__ == "__main__":
    main()
