"""Models with several lists of blocks: those that text goes through are folded, dropped and measured."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3nTextConfig,
    Idefics2Config,
    LlamaConfig,
    LlavaConfig,
    PaliGemmaConfig,
    Qwen2VLConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import tensorfold
from tensorfold import InputError, LowRank, Recipe, Rule
from tensorfold.hf.surgery import keep_layers
from tensorfold.models.anatomy import blocks

MLP = Recipe((Rule("mlp", LowRank(keep=0.5)),))
FOLD = {"fold": [{"targets": "mlp", "method": "low-rank", "keep": 0.5}]}
TOKENS = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": 128}
TEXT = {**SIZES, **TOKENS, "num_hidden_layers": 3, "num_key_value_heads": 2}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
LONG = {**TOWER, "num_hidden_layers": 5}


def configs():
    qwen = {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    return {
        "gemma3": Gemma3Config(text_config={**TEXT, "head_dim": 8}, vision_config=LONG, mm_tokens_per_image=4,
                               image_token_index=299, boi_token_index=297, eoi_token_index=298),
        "llava": LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config={**LONG, "model_type": "clip_vision_model"},
                             image_token_id=299),
        "qwen2-vl": Qwen2VLConfig(text_config=qwen, vision_config={"depth": 5, "embed_dim": 32, "hidden_size": 32,
                                                                   "num_heads": 4}, image_token_id=299),
        "paligemma": PaliGemmaConfig(text_config={**TEXT, "head_dim": 8, "model_type": "gemma"},
                                     vision_config={**LONG, "model_type": "siglip_vision_model"}, image_token_id=299),
        "idefics2": Idefics2Config(text_config={**TEXT, "model_type": "mistral"}, vision_config=LONG,
                                   perceiver_config={"num_key_value_heads": 2, "resampler_n_heads": 4,
                                                     "resampler_head_dim": 8, "hidden_size": 32},
                                   image_token_id=299),
    }  # fmt: skip


def make(name):
    torch.manual_seed(0)
    config = configs()[name]
    return AutoModelForImageTextToText.from_config(config).eval()


@pytest.mark.parametrize("name", configs())
def test_text_is_folded_and_not_the_longer_tower(name):
    model = make(name)
    chain, found = blocks(model)
    assert len(found) == 3
    table = next(key for key, module in model.named_modules() if module is model.get_input_embeddings())
    assert chain.rpartition(".")[0] == table.rpartition(".")[0]
    assert all(key.startswith(f"{chain}.") for key in tensorfold.plan(model, MLP).modules)
    assert len(tensorfold.plan(model, MLP).modules) == 9


@pytest.mark.parametrize("name", configs())
def test_calibrated_on_text(name, tokenizer, prose):
    model = make(name)
    report = tensorfold.fold(model, MLP, tokenizer, [prose], calibration_tokens=200)
    assert set(report.metrics.values()) == {"activation"}


@pytest.mark.parametrize("name", configs())
def test_layers_are_those_of_the_text(name, tmp_path):
    model, ids = make(name), torch.arange(12)[None] + 10
    with torch.no_grad():
        prefix = blocks(model)[0]
        model.get_submodule(prefix)[1].forward = lambda hidden, *_, **__: hidden  # a block that is not there
        expected = model(input_ids=ids, use_cache=False).logits
        del model.get_submodule(prefix)[1].forward
        before = model.num_parameters()
        planned = tensorfold.plan(model, {"layers": [0, 2], **FOLD})
        assert len(planned.modules) == 6
        assert before == model.num_parameters()
        if name == "gemma3":  # of those here, the only one that is a causal language model to transformers
            assert str(tensorfold.plan(model.config, {"layers": [0, 2], **FOLD})) == str(planned)
        keep_layers(model, [0, 2])
        assert len(blocks(model)[1]) == model.config.get_text_config().num_hidden_layers == 2
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(input_ids=ids, use_cache=False).logits, expected)


def test_settings_that_count_layers_in_their_own_way_are_refused():
    """Gemma 3n has one table of embeddings for all layers."""
    sizes = {**TEXT, "num_hidden_layers": 3, "intermediate_size": [48] * 3, "head_dim": 8, "laurel_rank": 4}
    layers = {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 8}
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    model = AutoModelForCausalLM.from_config(Gemma3nTextConfig(layer_types=kinds, **sizes, **layers))
    before, config = {key: tensor.shape for key, tensor in model.state_dict().items()}, model.config.to_dict()
    with pytest.raises(InputError, match=r"layers: with layers \[0, 2\] of its 3, .* describes another"):
        tensorfold.fold(model, {"layers": [0, 2], **FOLD})
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == before
    assert model.config.to_dict() == config


def test_encoder_decoders_are_refused():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 300}
    config = T5Config(decoder_start_token_id=0, **sizes)
    for given in (config, T5ForConditionalGeneration(config)):
        with pytest.raises(InputError, match="encoder–decoder"):
            tensorfold.plan(given, MLP)
