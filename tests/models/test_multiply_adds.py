"""Multiply–adds of mixtures: those that torch counts when tokens are sent to few of the experts."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tensorfold
from tensorfold import LowRank, Recipe, Rule, SharedExperts
from tensorfold.benchmark.whole import model_macs, set_ways
from tensorfold.models.multiply_adds import experts_per_token, shares

TOKENS = 12
ROUTERS = 2 * 4 * 32  # blocks, experts, width: the routers' own products, which are no linear layers


def counted(model):
    """Multiply–adds a token of matrix products, by torch; attention's are batched, and none of these."""
    model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(TOKENS)[None])
    found = counter.get_flop_counts()["Global"]
    products = sum(found.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    return products / 2 / TOKENS - ROUTERS


@pytest.mark.parametrize("sent", [1, 2, 3])
def test_a_dense_mixture(tiny, sent):
    model = tiny("qwen3_moe", num_experts_per_tok=sent)
    planned = tensorfold.plan(model, Recipe((Rule("experts", LowRank(rank=4)),)))
    assert planned.macs_before == counted(model) == model_macs(model, TOKENS)
    assert planned.experts_per_token == sent


@pytest.mark.parametrize("method", [LowRank(rank=4), SharedExperts(keep=0.4)], ids=["each", "together"])
def test_a_folded_mixture(tiny, method):
    model = tiny("qwen3_moe")
    report = tensorfold.fold(model, Recipe((Rule("experts", method),)))
    set_ways(model, "chain")
    assert report.plan.macs_after < report.plan.macs_before
    assert report.plan.macs_after == counted(model) == model_macs(model, TOKENS)


def test_experts_in_lists_and_models_without(tiny):
    class Expert(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(4, 4)

    model = tiny("llama")
    assert experts_per_token(model) is None
    assert shares(model)("model.layers.0.mlp.up_proj") == 1
    model.model.layers[0].mlp.experts = torch.nn.ModuleList(Expert() for _ in range(8))
    assert experts_per_token(model) == 0
    model.config.num_experts_per_tok = 2
    share = shares(model)
    assert share("model.layers.0.mlp.experts.3.up") == 0.25
    assert share("model.layers.0.mlp.up_proj") == 1


def test_the_plan_says_so(command, mixture_directory):
    asked = ("plan", mixture_directory, "--keep", "0.5", "--targets", "experts")
    assert "multiply–adds a token" in (text := command(*asked).out)
    assert text.rstrip().endswith(", 2 experts of a layer for each token")
    assert json.loads(command(*asked, "--json").out)["experts_per_token"] == 2
