"""The terms of the healing loss against their formulas, and models that they cannot compare."""

import math

import pytest
import torch

from tensorfold.errors import InputError
from tensorfold.healing.losses import HealLoss, feed_forward_names
from tensorfold.recipes.settings import HealSettings


@pytest.fixture
def ids():
    return torch.randint(0, 300, (3, 12), generator=torch.Generator().manual_seed(1))


def our_hooks(model):
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return [hook for hook in hooks if hook.__module__.startswith("tensorfold")]


def test_every_term_is_what_its_formula_says(student, teacher, ids):
    settings = HealSettings(cross_entropy=0.5, kl=2.0, temperature=3.0, embedding=5.0, attention=7.0, ffn=11.0)
    loss = HealLoss(settings, student, teacher)
    total, terms = loss(student, teacher, ids)
    loss.close()

    seen = {}
    for side, model in (("s", student), ("t", teacher)):
        model.set_attn_implementation("eager")
        for k, layer in enumerate(model.model.layers):
            layer.mlp.register_forward_hook(lambda _, __, out, key=(side, k): seen.__setitem__(key, out))
        seen[side] = model(ids, output_attentions=True)
    s, t = (seen[side].logits.detach().double() for side in "st")
    expected = {}
    expected["cross_entropy"] = -torch.stack(
        [s[b, i].log_softmax(-1)[ids[b, i + 1]] for b in range(3) for i in range(11)]
    ).mean()
    p, q = (t / 3).softmax(-1), (s / 3).softmax(-1)
    expected["kl"] = 9 * (p * (p / q).log()).sum(-1).mean()
    expected["embedding"] = (student.model.embed_tokens(ids) - teacher.model.embed_tokens(ids)).pow(2).mean()
    expected["ffn"] = sum((seen["s", k] - seen["t", k]).pow(2).mean() for k in range(2)) / 2
    rows = [
        sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True) if a > 0)
        for p_layer, q_layer in zip(seen["t"].attentions, seen["s"].attentions, strict=True)
        for p, q in zip(p_layer.flatten(0, 2), q_layer.flatten(0, 2), strict=True)
    ]
    expected["attention"] = sum(rows) / len(rows)
    assert terms.keys() == expected.keys()
    expected = {name: float(torch.as_tensor(value).detach()) for name, value in expected.items()}
    for name, value in expected.items():
        assert value > 1e-7, name
        # The models are nearly equal, so a KL in single precision has few digits.
        assert terms[name].item() == pytest.approx(value, rel=1e-3), name
    weighted = {"cross_entropy": 0.5, "kl": 2.0, "embedding": 5.0, "attention": 7.0, "ffn": 11.0}
    assert total.item() == pytest.approx(sum(w * expected[name] for name, w in weighted.items()), rel=1e-3)


def test_layerwise_terms_have_gradients_and_leave_the_models_as_they_were(student, teacher, ids):
    before = [m.config._attn_implementation for m in (student, teacher)]
    loss = HealLoss(HealSettings(cross_entropy=0, embedding=1, attention=1, ffn=1), student, teacher)
    assert our_hooks(student)
    loss(student, teacher, ids)[0].backward()
    loss.close()
    assert student.model.layers[1].mlp.down_proj.cores[0].grad.abs().max() > 0
    assert student.model.embed_tokens.cores[0].grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert [m.config._attn_implementation for m in (student, teacher)] == before
    assert not our_hooks(student) + our_hooks(teacher)


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("gpt2", ["transformer.h.0.mlp", "transformer.h.1.mlp"]),
        ("llama", ["model.layers.0.mlp", "model.layers.1.mlp"]),
        ("opt", ["model.decoder.layers.0.fc2", "model.decoder.layers.1.fc2"]),
        ("gpt_neox", ["gpt_neox.layers.0.mlp", "gpt_neox.layers.1.mlp"]),
    ],
)
def test_feed_forward_modules_are_found(tiny, architecture, names):
    assert feed_forward_names(tiny(architecture)) == names


@pytest.mark.parametrize(
    ("changed", "terms", "message"),
    [
        ({"vocab_size": 310}, {"kl": 1}, "300 tokens in the vocabulary, the teacher 310; the kl term"),
        ({"num_hidden_layers": 3}, {"attention": 1}, "2 blocks, the teacher 3; the attention term"),
        ({"num_hidden_layers": 3}, {"ffn": 1}, "2 blocks, the teacher 3; the ffn term"),
        ({"hidden_size": 64}, {"embedding": 1}, "32 as width, the teacher 64; the embedding term"),
        ({"num_attention_heads": 8}, {"attention": 1}, r"attention of shapes \(1, 4, 2, 2\) and \(1, 8, 2, 2\)"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(student, tiny, changed, terms, message):
    with pytest.raises(InputError, match=message):
        HealLoss(HealSettings(**terms), student, tiny("llama", **changed))
    assert not our_hooks(student)


def test_a_model_without_attention_probabilities_is_refused(student, teacher, monkeypatch):
    monkeypatch.setattr(type(student), "set_attn_implementation", lambda *_: (_ for _ in ()).throw(ValueError("none")))
    with pytest.raises(InputError, match=r"no eager attention \(none\)"):
        HealLoss(HealSettings(attention=1), student, teacher)
