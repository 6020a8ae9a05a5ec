"""``resize_token_embeddings`` of folded models: it grows the table, or refuses and leaves the model as it was."""

import copy
import pickle

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tensorfold
from tensorfold import InputError

IDS = torch.arange(3, 11)[None]
MLP = {"targets": "mlp", "method": "low-rank", "keep": 0.5}
HEAD = {"targets": ["lm_head"], "method": "low-rank", "keep": 0.5}
TABLE = {"targets": "embedding", "method": "low-rank", "keep": 0.5}
GRADED = {"targets": "embedding", "method": "graded", "keep": 0.5}
TOKENS = {"targets": "embedding", "method": "token-mps", "modes": [4, 8], "rank": 3}


def folded(*rules, tied=False, int8=False):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=4, max_position_embeddings=64, tie_word_embeddings=tied)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    tensorfold.fold(model, {"fold": list(rules)})
    if int8:
        tensorfold.quantize(model)
    return model


def through_a_file(model, folder):
    model.save_pretrained(folder)
    return tensorfold.load(folder)


REFUSED = {
    "head alone": ([HEAD], {}),
    "table alone": ([TABLE], {}),
    "table and head": ([TABLE, HEAD], {}),
    "tied table": ([TABLE], {"tied": True}),
    "graded": ([GRADED], {"tied": True}),
    "a chain a token, folded head": ([TOKENS, HEAD], {}),
    "int8": ([MLP], {"int8": True}),
    "tied int8": ([MLP], {"tied": True, "int8": True}),
    "chains in int8": ([TOKENS], {"tied": True, "int8": True}),
}


@pytest.mark.parametrize("stored", [False, True], ids=["in memory", "loaded"])
@pytest.mark.parametrize(("rules", "options"), REFUSED.values(), ids=REFUSED)
def test_a_refused_resize_changes_nothing(rules, options, stored, tmp_path):
    model = folded(*rules, **options)
    model = through_a_file(model, tmp_path / "model") if stored else model
    before, settings = copy.deepcopy(model.state_dict()), model.config.to_dict()
    with pytest.raises(InputError, match=r"resize_token_embeddings of the dense model"):
        model.resize_token_embeddings(310)
    with pytest.raises(InputError):
        model.resize_token_embeddings(290)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model.config.to_dict() == settings
    assert model.resize_token_embeddings() is model.resize_token_embeddings(300) is model.get_input_embeddings()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_dense_tables_and_heads_of_folded_models_are_resized(tied, tmp_path):
    model = folded(MLP, tied=tied)
    logits = model(IDS).logits
    for again in (model, through_a_file(model, tmp_path / "model")):
        again.resize_token_embeddings(310)
        grown = again(IDS).logits
        assert grown.shape[-1] == 310
        torch.testing.assert_close(grown[..., :300], logits)
        assert through_a_file(again, tmp_path / f"grown-{again is model}").config.vocab_size == 310


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_grow_like_the_original(copied, tied):
    model = folded(TOKENS, tied=tied)
    logits = model(IDS).logits
    again = copied(model)
    assert again.resize_token_embeddings(310).num_embeddings == 310
    torch.testing.assert_close(again(IDS).logits[..., :300], logits)
    assert model.get_input_embeddings().num_embeddings == 300
    assert model(IDS).logits.shape[-1] == 300
