"""Experts that transformers keeps in one tensor: found, folded each by itself, saved, and computed in every way."""

import copy

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import tensorfold
from tensorfold import MPO, Auto, InputError, Kronecker, LowRank, Recipe, Rule, SharedExperts
from tensorfold.hf.dense import plain_model
from tensorfold.hf.surgery import take_experts_apart
from tensorfold.models.anatomy import matrices
from tensorfold.models.experts import fused_experts, stacks
from tensorfold.models.targets import match

IDS = torch.arange(10, 34).reshape(2, 12)
SMALL = {
    "vocab_size": 300, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 16, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    "tie_word_embeddings": False, "head_dim": 12,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_local_experts": 4}
CONFIGS = {
    "Mixtral": {},
    "Qwen3Moe": {"decoder_sparse_step": 1},
    "Olmoe": {},
    "GptOss": {},
    "Llama4Text": {"intermediate_size_mlp": 16, "attention_chunk_size": 32},
    "DeepseekV3": {
        "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8,
        "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 4,
        "first_k_dense_replace": 1,
    },
    "JetMoe": {"kv_channels": 12, "num_key_value_heads": 1},
}  # fmt: skip
EXPERTS = Recipe((Rule("experts", LowRank(keep=0.5, pivots=True)),))


def make(name):
    kind = getattr(transformers, f"{name}Config")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**{**SMALL, **MOE, **CONFIGS[name]})).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_computes_the_same_with_its_experts_apart(name):
    model = make(name)
    apart = copy.deepcopy(model)
    for tensor in fused_experts(apart):
        take_experts_apart(apart, tensor)
    assert sum(p.numel() for p in apart.parameters()) == sum(p.numel() for p in model.parameters())
    for way in ("eager", "batched_mm", "grouped_mm"):
        for each in (model, apart):
            each.config._experts_implementation = way
        torch.testing.assert_close(logits(apart), logits(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_folded_experts_come_back_and_no_way_needs_the_dense_tensor(name, tmp_path, monkeypatch):
    model = make(name)
    dense = sum(p.numel() for p in model.parameters())
    routers = {key: p.clone() for key, p in model.state_dict().items() if "gate.weight" in key or "router" in key}
    report = tensorfold.fold(model, EXPERTS)
    tensors = stacks(model)
    assert tensors
    assert not fused_experts(model)
    assert {key.rpartition(".")[0] for key in report.modules} == tensors.keys()
    assert sum(p.numel() for p in model.parameters()) == report.plan.parameters_after < dense
    assert all(torch.equal(p, model.state_dict()[key]) for key, p in routers.items())
    expected = logits(model)
    model.save_pretrained(tmp_path / "folded")
    loaded = tensorfold.load(tmp_path / "folded")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=0)
    plain_model(again).save_pretrained(tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert fused_experts(plain)
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(type(next(iter(stacks(loaded).values()))), "matrices", None)
    for way in ("eager", "batched_mm", "grouped_mm"):
        loaded.config._experts_implementation = way
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)
    loaded.generate(IDS[:, :4], max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss", "Llama4Text"])
def test_one_train_for_all_experts_of_a_tensor(name, calibrated, tokenizer, prose, tmp_path, monkeypatch):
    model = make(name)
    recipe = Recipe((Rule("experts", SharedExperts(keep=0.6)),))
    given = (tokenizer, [prose]) if calibrated else ()
    report = tensorfold.fold(model, recipe, *given, calibration_tokens=240 if calibrated else None)
    assert report.modules.keys() == stacks(model).keys()
    assert len(report.modules) == 4
    assert report.plan.kept <= 0.6
    assert tensorfold.plan(make(name), recipe).parameters_after == sum(p.numel() for p in model.parameters())
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for stack in stacks(model).values() for p in stack.parameters())
    expected = logits(model)
    model.save_pretrained(tmp_path / "folded")
    loaded = tensorfold.load(tmp_path / "folded")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0)
    torch.testing.assert_close(logits(plain_model(loaded)), expected, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(type(next(iter(stacks(loaded).values()))), "matrices", None)
    for way in ("eager", "batched_mm", "grouped_mm"):
        loaded.config._experts_implementation = way
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)


def test_a_train_needs_all_experts_of_a_tensor():
    one = Recipe((Rule(["experts.gate_up_proj.1"], SharedExperts(keep=0.6)),))
    with pytest.raises(InputError, match="needed all of them among its targets"):
        tensorfold.plan(make("Qwen3Moe"), one)
    with pytest.raises(InputError, match="q_proj is in none"):
        tensorfold.plan(make("Qwen3Moe"), Recipe((Rule("attention", SharedExperts(keep=0.6)),)))


@pytest.mark.parametrize("method", [LowRank(keep=0.6), SharedExperts(keep=0.6)], ids=lambda m: m.name)
def test_experts_in_int8(method, tmp_path):
    model = make("Qwen3Moe")
    tensorfold.fold(model, Recipe((Rule("experts", method),)))
    expected = logits(model)
    tensorfold.quantize(model)
    assert (logits(model) - expected).abs().max() < 0.2 * expected.abs().max()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(tensorfold.load(tmp_path)), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("method", [LowRank(rank=3), Kronecker(keep=0.6), MPO(keep=0.6)], ids=lambda m: m.name)
@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss"])
def test_other_structures_fold_experts_and_learn(method, name, tmp_path):
    model = make(name)
    tensorfold.fold(model, Recipe((Rule("experts", method),)))
    model(input_ids=IDS, labels=IDS).loss.backward()
    for stack in stacks(model).values():  # every expert is sent some of the tokens
        assert all(p.grad is not None and p.grad.any() for p in stack.parameters())
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(tensorfold.load(tmp_path)), logits(model), rtol=0, atol=0)


def test_dequantize_gives_the_models_own_tensors_back():
    model = make("Mixtral")
    tensorfold.fold(model, EXPERTS)
    expected = logits(model)
    model.dequantize()
    assert len(fused_experts(model)) == 4
    assert not stacks(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_targets_name_experts():
    model = make("Qwen3Moe")
    available = matrices(model)
    first = "model.layers.0.mlp.experts"
    every = match("experts", available)
    assert len(every) == 16
    assert match(["experts.gate_up_proj.1"], available) == [
        f"model.layers.{k}.mlp.experts.gate_up_proj.1" for k in (0, 1)
    ]
    assert len(match(["down_proj"], available)) == 8
    assert match({"regex": r"layers\.0.*down_proj\.[01]"}, available) == [f"{first}.down_proj.{k}" for k in (0, 1)]
    assert not set(match("all-linear", available)) & set(every)
    assert (available[f"{first}.gate_up_proj.0"].out_features, available[f"{first}.gate_up_proj.0"].in_features) == (
        32,
        24,
    )
    turned = matrices(make("GptOss"))["model.layers.0.mlp.experts.gate_up_proj.0"]
    assert (turned.out_features, turned.in_features) == (32, 24)
    with pytest.raises(InputError, match="leave out split"):
        tensorfold.plan(model, Recipe((Rule("experts", LowRank(keep=0.5), split=2),)))


def test_some_experts_alone_can_be_folded(tmp_path):
    model = make("Qwen3Moe")
    tensorfold.fold(model, Recipe((Rule(["experts.gate_up_proj.1"], LowRank(keep=0.5)),)))
    assert len(stacks(model)) == 2
    assert len(fused_experts(model)) == 2
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(tensorfold.load(tmp_path)), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("effort", ["low", "medium"])
def test_one_budget_for_experts_and_the_rest_by_what_they_cost(effort, tokenizer, prose):
    model = make("Qwen3Moe")
    both = Recipe((Rule(["all-linear", "experts"], Auto(keep=0.6, effort=effort)),))
    report = tensorfold.fold(model, both, tokenizer, [prose], calibration_tokens=512)
    experts = {name: choice for name, choice in report.choices.items() if ".experts." in name}
    assert len({choice.rank for choice in experts.values()}) > 1
    assert {report.metrics[name] for name in experts if name in report.metrics} == {"loss"}
    assert report.plan.kept <= 0.6


@pytest.mark.parametrize("effort", ["low", "medium"])
def test_an_expert_that_no_text_meets_is_fitted_to_its_layers_tokens(effort, tokenizer, prose):
    model = make("DeepseekV3")
    model.model.layers[1].mlp.gate.e_score_correction_bias[3] = -1e4
    recipe = Recipe((Rule("experts", Auto(keep=0.6, effort=effort)),))
    with pytest.warns(UserWarning, match=r"2 layers are not called .*experts\.gate_up_proj\.3"):
        report = tensorfold.fold(model, recipe, tokenizer, [prose], calibration_tokens=512)
    assert len(report.modules) == 8
    assert report.plan.kept <= 0.6
    plain = LowRank(keep=0.6)
    tensorfold.fold(other := make("DeepseekV3"), Recipe((Rule("experts", plain),)), tokenizer, [prose])
    assert len(stacks(other)) == 2
