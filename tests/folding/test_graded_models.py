"""Graded tables in whole models: what calibration text does to them, checkpoints, plain models, healing."""

import copy

import pytest
import torch
from transformers import GPT2Config

import tensorfold
from tensorfold import MPO, Graded, InputError, Kronecker, LowRank, Recipe, Rule
from tensorfold.algebra.statistics import Statistics
from tensorfold.calibration.block_stream import inputs_of
from tensorfold.calibration.gradients import gradient_moments
from tensorfold.calibration.windows import calibration_windows, token_counts
from tensorfold.export.checkpoints import export_onnx
from tensorfold.healing.setup import choose_trained
from tensorfold.hf.dense import plain_model
from tensorfold.models.anatomy import count_parameters
from tensorfold.nn import GradedEmbedding, GradedHead, MPOEmbedding
from tensorfold.recipes.settings import HealSettings

# With and without a scale (Gemma), and a bias of the head (Phi).
ARCHITECTURES = ["gpt2", "llama", "gemma3", "opt", "phi"]
METHOD = Graded(keep=0.4, slope=0.7)
BOTH = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
IDS = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits


@pytest.fixture
def make(tiny, tokenizer, prose):
    def folded(architecture, tied=True, method=METHOD, calibrated=True):
        model = tiny(architecture, tied=tied)
        if model.get_output_embeddings().bias is not None:
            torch.nn.init.normal_(model.get_output_embeddings().bias)
        text = {"tokenizer": tokenizer, "calibration": [prose], "calibration_tokens": 500} if calibrated else {}
        return model, tensorfold.fold(model, Recipe((Rule("embedding", method),)), **text)

    return folded


def test_plan_needs_no_weights():
    plan = tensorfold.plan(GPT2Config(), Graded(keep=0.1, slope=0.8))
    (module,) = plan.to_dict()["modules"].values()
    assert sum(tokens for tokens, _ in module["classes"]) == 50257
    assert 0.09 < module["parameters"] / (50257 * 768) <= 0.1
    assert plan.parameters_before - plan.parameters_after == 50257 * 768 - module["parameters"]
    assert "exact" in str(plan)
    assert (
        plan.modules
        == tensorfold.plan(
            GPT2Config(),
            Recipe.from_dict({"fold": [{"targets": "embedding", "method": "graded", "keep": 0.1, "slope": 0.8}]}),
        ).modules
    )
    with pytest.raises(InputError, match=r"c_fc: graded folds embedding tables.*targets: embedding"):
        tensorfold.plan(GPT2Config(), Recipe((Rule("mlp", Graded(keep=0.5)),)))


@BOTH
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_checkpoints_and_plain_models(make, tmp_path, architecture, tied):
    model, report = make(architecture, tied)
    expected = logits(model)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert not torch.equal(table.position, torch.arange(300))
    assert report.parameters_after == count_parameters(model)
    assert list(report.metrics.values()) == ["text"]
    model.save_pretrained(tmp_path)
    loaded = tensorfold.load(tmp_path)
    for each in (loaded, copy.deepcopy(loaded)):
        assert torch.equal(logits(each), expected)
        assert torch.equal(each.get_input_embeddings().position, table.position)
        assert count_parameters(each) == report.parameters_after
        table, head = each.get_input_embeddings(), each.get_output_embeddings()
        assert isinstance(head, GradedHead) is tied
        assert not tied or all(a is b for a, b in zip(head.cores, table.cores, strict=True))
    plain = plain_model(loaded)
    assert not any(isinstance(module, GradedEmbedding | GradedHead) for module in plain.modules())
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)
    model(IDS, labels=IDS).loss.backward()
    assert all(core.grad.abs().sum() > 0 for core in model.get_input_embeddings().cores)


def test_tables_are_fitted_to_the_text(make, tiny, tokenizer, prose):
    """The fold is the solver's answer for counts and moments taken here by themselves."""
    method = Graded(keep=0.4, slope=0.7, exponent=0.5)
    dense = tiny("llama")
    weight = dense.get_input_embeddings().weight.detach().clone()
    counts = torch.tensor(tokenizer(prose)["input_ids"]).bincount(minlength=300)
    counts[:2] = counts.max()  # <s> and </s>
    assert torch.equal(token_counts(tokenizer, [prose], 300), counts)
    assert torch.equal(token_counts(tokenizer, [prose, prose], 300), 2 * counts)
    windows = calibration_windows(tokenizer, [prose], 500, 128)
    states = inputs_of(lambda: dense(windows), dense.lm_head, dense)
    gradients = gradient_moments(dense, windows, {"table": dense.model.embed_tokens})["table"].full()
    known = Statistics(states.T @ states / len(states), gradients, counts, states)
    expected = GradedEmbedding(method.spec(300, 32))
    expected.load_factors(method.solve(weight, expected.spec, known))
    expected = expected.to_dense()
    model, report = make("llama", method=method)
    torch.testing.assert_close(model.get_input_embeddings().to_dense(), expected, rtol=1e-4, atol=1e-5)
    kept = model.get_input_embeddings().spec.classes[0][0]
    frequent = counts.argsort(descending=True, stable=True)[:kept]
    assert torch.equal(model.get_input_embeddings().position[frequent], torch.arange(kept))
    assert 0.05 < report.errors["model.embed_tokens"] < 1


def test_text_lowers_the_error_that_matters(make, tiny, tokenizer, prose):
    """Mean squared error of the logits of the text's own tokens, against a fold without text and plain low rank."""
    dense, ids = tiny("llama"), calibration_windows(tokenizer, [prose], 256, 64)
    counts = token_counts(tokenizer, [prose], 300)
    models = [make("llama", calibrated=text)[0] for text in (True, False)]
    models.append(make("llama", method=LowRank(keep=0.4), calibrated=False)[0])
    assert isinstance(models[-1].get_input_embeddings(), MPOEmbedding)
    with torch.no_grad():
        wanted = dense(ids).logits
        aware, free, flat = (((model(ids).logits - wanted).square().mean((0, 1)) @ counts.float()) for model in models)
    assert aware < 0.8 * free
    assert aware < 0.8 * flat


@pytest.mark.parametrize("method", [LowRank(keep=0.3), MPO(keep=0.3, sites=2), Kronecker(keep=0.3)], ids=str)
def test_shared_structures_are_fitted_to_the_text_too(make, tiny, tokenizer, prose, method):
    dense, ids = tiny("llama"), calibration_windows(tokenizer, [prose], 256, 64)
    counts = token_counts(tokenizer, [prose], 300)
    with torch.no_grad():
        wanted = dense(ids).logits
        errors = [
            (make("llama", method=method, calibrated=text)[0](ids).logits - wanted).square().mean((0, 1))
            @ counts.float()
            for text in (True, False)
        ]
    assert errors[0] < 0.9 * errors[1]


def test_without_text_tokens_come_in_their_own_order(make):
    model, report = make("llama", calibrated=False)
    table = model.get_input_embeddings()
    assert torch.equal(table.position, torch.arange(300))
    assert list(report.metrics.values()) == ["weight"]


def test_another_models_tokenizer_is_refused(tiny, tokenizer, prose):
    model = tiny("llama", vocab_size=100)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="but the model has 100 tokens"):
        token_counts(tokenizer, [prose], 100)
    with pytest.raises(InputError, match="but the model has 100 tokens"):
        tensorfold.fold(model, Graded(keep=0.5), tokenizer, [prose], calibration_tokens=100)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_new_tokens_are_refused_by_name(make):
    model, _ = make("llama")
    with pytest.raises(InputError, match=r"GradedEmbedding.*Call resize_token_embeddings of the dense model"):
        model.resize_token_embeddings(310)


def test_healing_trains_the_cores_and_keeps_the_tie(make, tokenizer, text_file):
    model, _ = make("gpt2")
    table = model.transformer.wte
    tables = {id(core) for core in table.cores}
    assert tables <= {id(p) for p in choose_trained(model, HealSettings(train="cores"))}
    assert not tables & {id(p) for p in choose_trained(model, HealSettings(train="all-but-embeddings"))}
    before = [core.detach().clone() for core in table.cores]
    order = table.position.clone()
    settings = {"steps": 2, "batch": 2, "block": 16, "lr": 1e-2, "validation_fraction": 0.2}
    tensorfold.heal(model, text_file, tokenizer=tokenizer, train="cores", **settings)
    assert not any(torch.equal(core, old) for core, old in zip(table.cores, before, strict=True))
    assert torch.equal(table.position, order)
    assert all(a is b for a, b in zip(model.lm_head.cores, table.cores, strict=True))


def test_onnx_holds_the_cores(tiny, tmp_path):
    model = tiny("llama", num_hidden_layers=1)
    tensorfold.fold(model, METHOD)
    assert export_onnx(model, tmp_path / "out").difference < 1e-4
