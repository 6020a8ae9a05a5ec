"""Time of a training step of every shipped recipe's model against the dense model's: forward, backward and AdamW.

    OMP_NUM_THREADS=2 python studies/heal/step_time.py [RECIPE …] [--tokens 512] [--rounds 7]

Weights are random, since time does not depend on them. Both models are in memory and take steps in turn; for each
recipe a line with the median seconds of both, and the quartiles of the ratios of the pairs, goes to
``step_time.jsonl``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tensorfold.folding.plan import prepare
from tensorfold.healing.losses import cross_entropy
from tensorfold.hf.modules import empty_module, swap
from tensorfold.hf.sources import find_model
from tensorfold.models.anatomy import count_parameters
from tensorfold.recipes.recipe import Recipe

LOG = Path(__file__).with_suffix(".jsonl")
RECIPES = Path(__file__).parents[2] / "src/tensorfold/recipes"


def dense_model(name: str, recipe: Recipe) -> PreTrainedModel:
    """The recipe's model; of those that have none PicoGPT for its own recipes and GPT-2 for the rest."""
    if recipe.model == "smollm2-135m":
        return find_model(recipe.model).model().to(torch.float32)
    kind = "picogpt" if name.startswith("picogpt") else "gpt2"
    layers = {"num_hidden_layers": 6} if recipe.model == "distilgpt2" else {}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **layers))


def folded_model(name: str, recipe: Recipe) -> PreTrainedModel:
    model = dense_model(name, recipe)
    planned, chosen = prepare(model, recipe)
    for matrix, spec in planned.modules.items():
        module = empty_module(chosen[matrix], spec).to_empty(device="cpu")
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        for buffer in module.buffers():
            buffer.copy_(torch.arange(len(buffer)))
        swap(model, chosen[matrix], module)
    return model


def stepper(model: PreTrainedModel, ids: torch.Tensor) -> Callable[[], float]:
    """A function that takes one step and returns its seconds."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step() -> float:
        started = time.perf_counter()
        cross_entropy(model(input_ids=ids, use_cache=False).logits, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    return step


def measure(name: str, tokens: int, rounds: int) -> dict[str, object]:
    torch.manual_seed(0)
    recipe = Recipe.load(name)
    dense, folded = dense_model(name, recipe), folded_model(name, recipe)
    length = min(tokens, dense.config.max_position_embeddings)
    ids = torch.randint(dense.config.vocab_size, (tokens // length, length))
    sizes = [count_parameters(model) for model in (dense, folded)]
    steps = [stepper(model, ids) for model in (dense, folded)]
    for step in steps * 2:  # caches, thread pools, optimiser state
        step()
    times = [(steps[0](), steps[1]()) for _ in range(rounds)]
    low, middle, high = statistics.quantiles([folded / dense for dense, folded in times], n=4)
    return {
        "recipe": name,
        "parameters": sizes,
        "dense_s": round(statistics.median(dense for dense, _ in times), 3),
        "folded_s": round(statistics.median(folded for _, folded in times), 3),
        "ratio": round(middle, 3),
        "quartiles": [round(low, 3), round(high, 3)],
        "rounds": rounds,
        "tokens": tokens,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipes", nargs="*", metavar="RECIPE")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    for name in args.recipes or sorted(path.stem for path in RECIPES.glob("*.yaml")):
        entry = measure(name, args.tokens, args.rounds)
        with LOG.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(entry, flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
