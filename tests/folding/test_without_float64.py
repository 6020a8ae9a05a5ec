"""Folding on a device: everything is computed there, and what it has no float64 for on the CPU, to the same result."""

import pytest
import torch

import fake_card
import tensorfold
from tensorfold import Auto, Graded, Kronecker, LowRank, Recipe, Rule, Spec
from tensorfold.algebra import precision

RECIPES = {
    "auto": ("llama", Recipe((Rule("all-linear", Auto(keep=0.6)),))),
    "biases": ("gpt2", Recipe((Rule("all-linear", Auto(keep=0.6)),))),
    "experts": ("qwen3_moe", Recipe((Rule(["all-linear", "experts"], Auto(keep=0.6)),))),
    "table": ("gemma3", Recipe((Rule("embedding", Graded(keep=0.5)), Rule("mlp", Kronecker(keep=0.5))))),
    "order": ("llama", Recipe((Rule("mlp", LowRank(keep=0.5)),))),
}


@pytest.mark.parametrize("float64", [True, False], ids=["float64", "no float64"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_fold_is_that_of_the_cpu(tiny, tokenizer, prose, card, monkeypatch, name, float64):
    architecture, recipe = RECIPES[name]
    monkeypatch.setattr(fake_card, "has_float64", float64)
    given = {"tokenizer": tokenizer, "calibration": [prose], "calibration_tokens": 256}
    there, here = tiny(architecture).to(fake_card.NAME), tiny(architecture)
    report = tensorfold.fold(there, recipe, **given)
    counted = dict(card)
    wanted = tensorfold.fold(here, recipe, **given)
    assert {parameter.device.type for parameter in there.parameters()} == {fake_card.NAME}
    assert counted[fake_card.NAME] > 0
    assert (counted.get("cpu", 0) > 1000) is not float64
    assert report.modules.keys() == wanted.modules.keys()
    assert sum(report.errors.values()) == pytest.approx(sum(wanted.errors.values()), rel=0.02)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(there(ids.to(fake_card.NAME)).logits.cpu(), here(ids).logits, atol=0.02)


def test_a_layer_is_fitted_where_it_can_be(card, monkeypatch):
    monkeypatch.setattr(fake_card, "has_float64", False)
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    spec = Spec((12, 1), (1, 8), (4,))
    there = tensorfold.nn.MPOLinear.from_dense(weight.to(fake_card.NAME), spec)
    assert there.cores[0].device.type == fake_card.NAME
    here = tensorfold.nn.MPOLinear.from_dense(weight, spec)
    assert torch.allclose(there.to_dense().cpu(), here.to_dense(), atol=1e-6)


def test_who_decides(card, monkeypatch):
    here = torch.ones(2)
    assert precision.solvable(here) is here
    there = here.to(fake_card.NAME)
    assert precision.solvable(there) is there
    precision.has_float64.cache_clear()
    monkeypatch.setattr(fake_card, "has_float64", False)
    assert precision.solvable(there).device.type == "cpu"
