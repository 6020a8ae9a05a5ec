"""Dropout in healing: off unless asked for, in every architecture, and never in terms that compare with a teacher."""

import copy
import json
import logging

import pytest
import torch
from torch import nn

import tensorfold
from tensorfold.errors import InputError
from tensorfold.healing.heal import heal
from tensorfold.healing.losses import HealLoss
from tensorfold.healing.noise import Noise
from tensorfold.recipes.settings import HealSettings

# Each architecture's names for dropout; gpt2, opt and gpt_neox have modules, the others numbers.
NOISY = {
    "gpt2": {"attn_pdrop": 0.4, "resid_pdrop": 0.3, "embd_pdrop": 0.2},
    "llama": {"attention_dropout": 0.5},
    "opt": {"dropout": 0.4, "attention_dropout": 0.5, "layerdrop": 0.9},
    "gpt_neox": {"attention_dropout": 0.5, "hidden_dropout": 0.3},
    "phi": {"resid_pdrop": 0.3, "embd_pdrop": 0.2, "attention_dropout": 0.5},
    "mistral": {"attention_dropout": 0.5},
}
TERMS = {"kl": 1.0, "embedding": 1.0, "attention": 1.0, "ffn": 1.0}


@pytest.fixture
def ids():
    return torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(1))


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def state(model):
    """All fractions in the modules and the configuration of a model, by their names."""
    places = [*model.modules(), model.config]
    return [{k: v for k, v in vars(place).items() if isinstance(v, float)} for place in places]


@pytest.mark.parametrize("architecture", NOISY)
def test_a_student_that_is_its_teacher_has_no_divergence(tiny, ids, architecture):
    student = tiny(architecture, **NOISY[architecture])
    teacher, calm = copy.deepcopy(student), logits(student, ids)
    student.train()
    assert not torch.equal(logits(student, ids), calm), "the test needs a model that draws"
    before = state(student)
    for dropout in (0.0, 0.3):
        loss = HealLoss(HealSettings(dropout=dropout, **TERMS), student, teacher)
        total, terms = loss(student, teacher, ids)
        total.backward()
        assert {name: terms[name].item() for name in TERMS} == pytest.approx(dict.fromkeys(TERMS, 0), abs=1e-6)
        own = torch.nn.functional.cross_entropy(calm[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert (terms["cross_entropy"].item() == pytest.approx(own.item(), abs=1e-5)) == (dropout == 0)
        loss.close()
        assert state(student) == before
    assert not torch.equal(logits(student, ids), calm), "dropout is back"


def test_one_probability_for_every_dropout(tiny):
    model = tiny("opt", **NOISY["opt"])
    noise = Noise(model, 0.25)
    layer = model.model.decoder.layers[0]
    assert (layer.dropout, layer.self_attn.dropout, model.config.attention_dropout) == (0.25, 0.25, 0.25)
    assert (model.model.decoder.layerdrop, model.config.layerdrop) == (0, 0), "whole layers are never left out"
    with noise.off():
        assert (layer.dropout, layer.self_attn.dropout) == (0, 0)
    assert layer.dropout == 0.25
    noise.restore()
    assert (layer.dropout, layer.self_attn.dropout, model.model.decoder.layerdrop) == (0.4, 0.5, 0.9)
    assert noise.of_configuration == (0.4, 0.5)


def test_modules_of_any_kind(tiny):
    model = tiny("llama")
    model.extra = nn.ModuleList([nn.Dropout(0.1), nn.Dropout1d(0.2), nn.AlphaDropout(0.3)])
    model.extra.drop_prob, model.extra.router_jitter_noise, model.extra.drop_last = 0.5, 0.01, True
    Noise(model, 0.0)
    assert [each.p for each in model.extra] == [0, 0, 0]
    assert (model.extra.drop_prob, model.extra.router_jitter_noise, model.extra.drop_last) == (0, 0, True)


def test_a_teacher_is_given_back_as_it_came(tiny, ids):
    student, teacher = tiny("gpt2"), tiny("gpt2").train()
    teacher.transformer.h[0].eval()
    teacher.transformer.wpe.requires_grad_(False)
    modes = [module.training for module in teacher.modules()]
    wanted = [parameter.requires_grad for parameter in teacher.parameters()]
    loss = HealLoss(HealSettings(kl=1), student, teacher)
    loss(student, teacher, ids)
    assert not teacher.training
    loss.close()
    assert [module.training for module in teacher.modules()] == modes
    assert [parameter.requires_grad for parameter in teacher.parameters()] == wanted


@pytest.fixture
def folded(tiny):
    def make():
        model = tiny("gpt2", attn_pdrop=0.5, resid_pdrop=0.5)
        tensorfold.fold(model, tensorfold.LowRank(keep=0.5))
        return model

    return make


FAST = {"steps": 2, "batch": 4, "block": 16, "lr": 1e-3, "validation_fraction": 0.1, "schedule": "constant"}


def test_healing_trains_without_the_dropout_of_the_configuration(folded, tiny, tokenizer, text_file, tmp_path, caplog):
    noisy, calm, drawn = folded(), folded(), folded()
    Noise(calm, 0.0)
    with caplog.at_level(logging.INFO, logger="tensorfold"):
        heal(noisy, text_file, tokenizer=tokenizer, out=tmp_path / "out", **FAST)
    assert "dropout 0 instead of the model's 0.1 to 0.5" in caplog.text
    heal(calm, text_file, tokenizer=tokenizer, **FAST)
    heal(drawn, text_file, tokenizer=tokenizer, **FAST, dropout=0.5)
    ours, quiet, other = (m.transformer.h[0].mlp.c_fc.cores[0] for m in (noisy, calm, drawn))
    assert torch.equal(ours, quiet)
    assert not torch.equal(ours, other)
    assert noisy.transformer.h[0].attn.attn_dropout.p == noisy.config.attn_pdrop == 0.5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["attn_pdrop"] == 0.5
    steps = [json.loads(line) for line in (tmp_path / "out" / "heal.jsonl").read_text().splitlines()]
    assert [step["dropout"] for step in steps if "loss" in step] == [0, 0]
    card = json.loads((tmp_path / "out" / "tensorfold.json").read_text())
    assert card["heal"]["settings"]["dropout"] == 0


def test_recomputed_passes_and_dropout_exclude_each_other():
    with pytest.raises(InputError, match="gradient_checkpointing"):
        HealSettings(dropout=0.1, kl=1, gradient_checkpointing=True)
