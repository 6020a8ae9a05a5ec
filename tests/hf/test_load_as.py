"""Folded checkpoints loaded as other classes, and from where the options of ``from_pretrained`` say."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import tensorfold
from tensorfold import InputError

IDS = torch.arange(3, 11)[None]
TABLE = {"targets": "embedding", "method": "graded", "keep": 0.7}
HEAD = {"targets": ["lm_head"], "method": "low-rank", "rank": 9}
MLP = {"targets": "mlp", "method": "low-rank", "keep": 0.5}
SPLIT = {"targets": ["attn.c_attn"], "method": "low-rank", "keep": 0.6, "split": 3}


def llama(tied=True):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, pad_token_id=0,
                         num_attention_heads=4, max_position_embeddings=64, tie_word_embeddings=tied)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=4, **ids)).eval()


CASES = {
    "tied table": (llama, [TABLE, MLP], False),
    "untied head": (lambda: llama(tied=False), [HEAD, MLP], False),
    "split": (gpt2, [SPLIT, MLP], False),
    "int8": (llama, [TABLE, MLP], True),
}


@pytest.fixture(params=CASES, ids=str)
def saved(request, tmp_path):
    """A folded model and the directory that it was saved to."""
    make, rules, int8 = CASES[request.param]
    model = make()
    tensorfold.fold(model, {"fold": rules})
    if int8:
        tensorfold.quantize(model)
    model.save_pretrained(tmp_path / "folded")
    return model, tmp_path / "folded"


def states(model):
    with torch.no_grad():
        return model(IDS, output_hidden_states=True).hidden_states[-1]


def test_a_base_model_gives_the_same_states(saved, tmp_path):
    model, directory = saved
    base = AutoModel.from_pretrained(directory).eval()
    assert torch.equal(states(base), states(model))
    base.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base").eval()
    assert torch.equal(states(again), states(model))
    assert load_file(tmp_path / "base" / "model.safetensors").keys() <= base.state_dict().keys()


def test_a_classifier_gives_the_same_states(saved):
    model, directory = saved
    classifier = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=3).eval()
    assert torch.equal(states(classifier), states(model))
    with torch.no_grad():
        assert classifier(IDS).logits.shape == (1, 3)


def test_what_the_saved_class_lacks_is_still_told(saved):
    model, directory = saved
    name = next(iter(model.config.quantization_config.modules or model.config.quantization_config.int8))
    config = (directory / "config.json").read_text()
    (directory / "config.json").write_text(config.replace(f'"{name}"', f'"elsewhere.{name}"'))
    with pytest.raises(InputError, match="lacks"):
        tensorfold.load(directory)


def test_options_reach_weights_and_configuration_alike(tmp_path):
    """A folded model in a subfolder, under a revision, in a cache of its own: as ``from_pretrained`` finds them."""
    model = llama()
    tensorfold.fold(model, {"fold": [MLP]})
    model.save_pretrained(tmp_path / "repo" / "folded")
    root = tmp_path / "cache" / "models--some--model"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "small").write_text("1" * 40)
    shutil.copytree(tmp_path / "repo", root / "snapshots" / ("1" * 40))
    shutil.copytree(tmp_path / "repo" / "folded", root / "snapshots" / ("1" * 40), dirs_exist_ok=True)
    for place, options in (
        (tmp_path / "repo", {"subfolder": "folded"}),
        ("some/model", {"revision": "small", "cache_dir": tmp_path / "cache"}),
        ("some/model", {"revision": "small", "cache_dir": tmp_path / "cache", "subfolder": "folded"}),
    ):
        expected = AutoModelForCausalLM.from_pretrained(place, **options)
        loaded = tensorfold.load(place, dtype="float64", **options)
        assert loaded.dtype == torch.float64
        assert loaded.state_dict().keys() == expected.state_dict().keys()
    with pytest.raises(InputError, match="no such directory"):
        tensorfold.load("some/model", revision="large", cache_dir=tmp_path / "cache")


def test_pickles_in_a_subfolder_are_seen(tmp_path):
    llama().save_pretrained(tmp_path / "repo" / "dense")
    (tmp_path / "repo" / "dense" / "model.safetensors").rename(tmp_path / "repo" / "dense" / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickles"):
        tensorfold.load(tmp_path / "repo", subfolder="dense")
