"""``model.dequantize()`` of transformers: a folded model becomes the dense one that it stands for."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import tensorfold
from tensorfold import InputError

IDS = torch.arange(3, 11)[None]
MLP = {"targets": "mlp", "method": "kronecker", "factor": [16, 8], "terms": 2}
TABLE = {"targets": "embedding", "method": "graded", "keep": 0.6}
SPLIT = {"targets": ["c_attn"], "method": "low-rank", "rank": 4, "split": 3}


def folded(tied):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, pad_token_id=0, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=4, max_position_embeddings=64, tie_word_embeddings=tied)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    tensorfold.fold(model, {"fold": [MLP, TABLE]})
    return model


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("loaded", [False, True], ids=["in memory", "loaded"])
def test_a_folded_model_becomes_dense(tied, loaded, tmp_path):
    model = folded(tied)
    if loaded:
        model.save_pretrained(tmp_path / "folded")
        model = tensorfold.load(tmp_path / "folded")
    before = logits(model)
    assert model.dequantize() is model
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    assert isinstance(model.get_input_embeddings(), torch.nn.Embedding)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    assert not hasattr(model.config, "quantization_config")
    model.resize_token_embeddings(310)
    model.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(again), logits(model))
    assert tensorfold.fold(model, {"fold": [MLP]}).parameters_after < sum(p.numel() for p in again.parameters())


def test_in_another_dtype():
    model = folded(True).to(torch.float64)  # which its configuration does not know
    assert model.dequantize().dtype is torch.float64
    assert folded(True).dequantize(dtype=torch.bfloat16).dtype is torch.bfloat16


def test_split_matrices_are_whole_again(tiny):
    model = tiny("gpt2")
    tensorfold.fold(model, {"fold": [SPLIT]})
    before = logits(model)
    torch.testing.assert_close(logits(model.dequantize()), before, rtol=1e-4, atol=1e-5)


def test_models_without_their_head(tmp_path):
    folded(True).save_pretrained(tmp_path / "folded")
    for cls in (AutoModel, AutoModelForSequenceClassification):
        model = cls.from_pretrained(tmp_path / "folded").eval()
        with torch.no_grad():
            before = model(IDS, output_hidden_states=True).hidden_states[-1]
            after = model.dequantize()(IDS, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
        assert isinstance(model.get_input_embeddings(), torch.nn.Embedding)


def test_int8_has_no_floating_form():
    model = folded(True)
    tensorfold.quantize(model)
    before = logits(model)
    with pytest.raises(InputError, match="int8"):
        model.dequantize()
    assert torch.equal(logits(model), before)
