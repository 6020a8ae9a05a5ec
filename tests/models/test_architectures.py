"""What the campaign over all architectures found (``studies/reliability/architectures.py``), a model for each kind."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    HunYuanMoEV1Config,
    MambaConfig,
    MptConfig,
    OpenAIGPTConfig,
    RwkvConfig,
    XLMConfig,
)

import tensorfold
from tensorfold import Auto, LowRank, Recipe, Rule
from tensorfold.errors import InputError

TOKENS = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IDS = torch.arange(10, 34).reshape(2, 12)
CONFIGS = {
    "bert": BertConfig(is_decoder=True, max_position_embeddings=64, **SIZES, **TOKENS),
    "openai-gpt": OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=4, n_positions=64, **TOKENS),
    "hunyuan": HunYuanMoEV1Config(num_experts=4, moe_topk=2, num_key_value_heads=2, head_dim=8, **SIZES, **TOKENS),
    "mamba": MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=8, time_step_rank=4, **TOKENS),
    "rwkv": RwkvConfig(hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, intermediate_size=48, **TOKENS),
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=4, **TOKENS),
    "mpt": MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=300),
}


def make(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_survive_saving(name, tmp_path):
    """Bert's and GPT's position indices are in no file, and belong to the parent of a folded table."""
    model = make(name)
    half = LowRank(keep=0.6)
    rules = [Rule("all-linear", Auto(keep=0.6)), *([Rule("embedding", half)] if name in ("bert", "openai-gpt") else [])]
    tensorfold.fold(model, Recipe(tuple(rules)))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(tensorfold.load(tmp_path)), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "read", "folded"),
    [
        ("hunyuan", "mlp.gate.wg", "q_proj"),  # F.linear(x, self.wg.weight)
        ("mamba", "mixer.x_proj", "mixer.in_proj"),  # handed to a kernel
        ("rwkv", "attention.output", "attention.key"),  # scaled in place
        ("bloom", None, "dense_4h_to_h"),  # sliced, where pretraining_tp asks for it
    ],
)
def test_layers_whose_weight_is_read_are_left_alone(name, read, folded):
    model = make(name)
    modules = tensorfold.plan(model, Recipe((Rule("all-linear", LowRank(keep=0.5)),))).modules
    assert any(module.endswith(folded) for module in modules)
    if read is not None:
        assert not [module for module in modules if module.endswith(read)]
        assert model.get_submodule(next(n for n, _ in model.named_modules() if n.endswith(read))) is not None
        with pytest.raises(InputError, match="matches nothing"):
            tensorfold.plan(model, Recipe((Rule([read], LowRank(keep=0.5)),)))


def test_windows_are_no_longer_than_the_positions(tokenizer, prose):
    model = make("mpt")
    tensorfold.fold(model, Recipe((Rule("all-linear", Auto(keep=0.6, effort="low")),)), tokenizer, [prose],
                    calibration_tokens=300)  # fmt: skip
    assert torch.isfinite(logits(model)).all()
    with pytest.raises(InputError, match="context of 128 tokens"):
        tensorfold.evaluate(model, tokenizer, prose, protocol="disjoint-128")


def test_fewer_positions_than_the_configuration_says(tokenizer, prose, monkeypatch):
    monkeypatch.setattr(tensorfold.folding.in_memory, "check_described", lambda _: None)  # positions
    model = make("bert")
    model.config.max_position_embeddings = 100
    with pytest.raises(InputError, match="BertLMHeadModel does not run on 100 tokens at a time"):
        tensorfold.fold(model, LowRank(keep=0.5), tokenizer, [prose], calibration_tokens=300)


def test_parts_of_a_block_in_lists_beside_each_other_belong_to_it():
    """XLM keeps attention in one list of modules and its MLPs in another."""
    config = XLMConfig(emb_dim=32, n_layers=2, n_heads=4, n_words=300, max_position_embeddings=64, causal=True)
    model = AutoModelForCausalLM.from_config(config).eval()
    report = tensorfold.fold(model, Recipe((Rule("mlp", LowRank(keep=0.5)),)))
    assert sorted(report.modules) == [f"transformer.ffns.{k}.lin{n}" for k in (0, 1) for n in (1, 2)]
