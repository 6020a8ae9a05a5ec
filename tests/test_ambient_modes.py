"""Modes that the calling code has switched on change no result."""

import copy
from contextlib import contextmanager

import pytest
import torch

import tensorfold
from tensorfold import Graded, InputError, LowRank, Recipe, Rule
from tensorfold.export.checkpoints import export_dense
from tensorfold.nn import MPOLinear, cache_matrices

IDS = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(0))
RECIPE = Recipe([Rule("mlp", LowRank(keep=0.6, pivots=True)), Rule("embedding", Graded(keep=0.5))])


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "inference": torch.inference_mode,
    "no-grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.fixture(params=MODES)
def mode(request):
    return MODES[request.param]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name])


@pytest.fixture(scope="module")
def folded(tiny, tokenizer, prose):
    model = tiny("llama")
    tensorfold.fold(model, RECIPE, tokenizer, [prose], calibration_tokens=500)
    return model


def test_calibrated_folds(mode, tiny, tokenizer, prose, folded):
    model = tiny("llama")
    with mode():
        kept = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.get_default_dtype()
        tensorfold.fold(model, RECIPE, tokenizer, [prose], calibration_tokens=500)
        assert kept == (torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.get_default_dtype())
    assert_same(state(model), state(folded))
    assert not any(parameter.is_inference() for parameter in model.parameters())
    model(IDS, labels=IDS).loss.backward()


def test_searched_folds(mode, tiny, tokenizer, prose):
    models = tiny("llama"), tiny("llama")
    keep = Recipe.keep(0.5, "mlp", "low")
    tensorfold.fold(models[0], keep, tokenizer, [prose], calibration_tokens=500)
    with mode():
        tensorfold.fold(models[1], keep, tokenizer, [prose], calibration_tokens=500)
    assert_same(state(models[0]), state(models[1]))


def test_evaluation(mode, folded, tokenizer, prose):
    judge = {"tokenizer": tokenizer, "text": prose, "protocol": "disjoint-128", "max_tokens": 600}
    want = tensorfold.evaluate(folded, **judge).perplexity
    with mode():
        assert tensorfold.evaluate(folded, **judge).perplexity == want


def test_loading_int8_and_dense_export(mode, folded, tokenizer, tmp_path):
    folded.save_pretrained(tmp_path / "folded")
    tokenizer.save_pretrained(tmp_path / "folded")
    with mode():
        loaded = tensorfold.load(tmp_path / "folded")
        eight = copy.deepcopy(loaded)
        tensorfold.quantize(eight)
        export_dense(loaded, tmp_path / "dense", tokenizer)
    assert_same(state(loaded), state(folded))
    assert not any(parameter.is_inference() for parameter in loaded.parameters())
    other = copy.deepcopy(folded)
    tensorfold.quantize(other)
    assert_same(state(eight), state(other))
    dense = tensorfold.load(tmp_path / "dense")
    with torch.no_grad():
        torch.testing.assert_close(dense(IDS).logits, folded(IDS).logits, rtol=1e-4, atol=1e-5)


def test_healing(mode, folded, tokenizer, text_file):
    healed = copy.deepcopy(folded), copy.deepcopy(folded)
    settings = {"tokenizer": tokenizer, "steps": 2, "batch": 4, "block": 16, "lr": 1e-3, "select": "last"}
    tensorfold.heal(healed[0], text_file, **settings)
    with mode():
        tensorfold.heal(healed[1], text_file, **settings)
    assert_same(state(healed[0]), state(healed[1]))
    assert not torch.equal(next(healed[0].parameters()), next(folded.parameters()))


def test_models_made_under_inference_mode(tiny, tokenizer, prose, folded, text_file):
    with torch.inference_mode():
        model = tiny("llama", attention_dropout=0.0)
    plain = tiny("llama", attention_dropout=0.0)
    report = tensorfold.evaluate(model, tokenizer, prose, "disjoint-128", max_tokens=600)
    assert report.perplexity == tensorfold.evaluate(plain, tokenizer, prose, "disjoint-128", max_tokens=600).perplexity
    tensorfold.fold(copy.deepcopy(model), Recipe([Rule("mlp", LowRank(keep=0.5))]), tokenizer, [prose])
    recipe = Recipe.keep(0.5, "mlp", "low")
    with pytest.raises(InputError, match=r"made under torch\.inference_mode"):
        tensorfold.fold(model, recipe, tokenizer, [prose], calibration_tokens=500)
    with pytest.raises(InputError, match=r"made under torch\.inference_mode"):
        tensorfold.heal(model, text_file, tokenizer=tokenizer, steps=2)


def test_kept_matrices_of_layers_made_under_inference_mode():
    spec = LowRank(keep=0.9).spec(96, 64)
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        layer = MPOLinear(spec)
    layer.hold_matrix(True)
    with torch.inference_mode():
        first = layer(x).clone()
        layer.cores[0].mul_(2)
        torch.testing.assert_close(layer(x) - layer.bias, 2 * (first - layer.bias), rtol=1e-4, atol=1e-4)
    assert isinstance(cache_matrices(torch.nn.Sequential(layer), 1.0), dict)
