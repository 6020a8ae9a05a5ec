"""Plans: counts to the digit, targets, and no weights needed."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

import tensorfold
from tensorfold import MPO, InputError, Kronecker, LowRank, Recipe, Rule
from tensorfold.folding.plan import skeleton
from tensorfold.models.anatomy import blocks, count_parameters, matrices
from tensorfold.models.targets import match
from tensorfold.recipes.recipe import shipped_recipes


def test_gpt2_by_kronecker_counts_as_in_the_paper():
    """Krony-PT, Table 2: 81M; GPT-2 124M with its tied head counted once."""
    plan = tensorfold.plan(GPT2Config(), Kronecker(factor=(768, 768)))
    assert (plan.parameters_before, plan.parameters_after) == (124_439_808, 81_972_576)
    assert len(plan.modules) == 24
    assert plan.modules["transformer.h.0.mlp.c_fc"] == tensorfold.Spec.kronecker(3072, 768, (768, 768))
    assert plan.modules["transformer.h.11.mlp.c_proj"] == tensorfold.Spec.kronecker(768, 3072, (768, 768))
    assert plan.parameters_after == plan.to_dict()["parameters_after"]
    assert "81,972,576" in str(plan)


def test_plan_needs_no_weights_and_changes_nothing():
    config = GPT2Config(n_embd=1600, n_layer=48, n_head=25)
    model = skeleton(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    plan = tensorfold.plan(config, LowRank(keep=0.5))
    assert plan.parameters_before == 1_557_611_200
    assert 0.49 < plan.kept <= 0.5
    tensorfold.plan(model, LowRank(keep=0.5))
    assert count_parameters(model) == 1_557_611_200


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2", "opt", "gpt_neox", "gemma3", "phi", "mistral"])
def test_targets_cover_the_blocks_of_any_architecture(tiny, architecture):
    """MLP and attention together are all linears of the blocks, each matrix once; nothing else is."""
    model = tiny(architecture)
    available = matrices(model)
    mlp, attention = match("mlp", available), match("attention", available)
    assert mlp
    assert attention
    assert not set(mlp) & set(attention)
    assert set(match("all-linear", available)) == {*mlp, *attention}
    name, chain = blocks(model)
    assert len(chain) == 2
    weights = {
        id(p) for n, p in model.named_parameters() if n.startswith(name + ".") and p.dim() == 2 and "norm" not in n
    }
    assert {id(available[n].parameter) for n in (*mlp, *attention)} == weights
    (embedding,) = match("embedding", available)
    assert available[embedding].parameter is model.get_input_embeddings().weight
    assert available[embedding].tied_head is not None


def test_rules_apply_in_order_and_exclude_is_respected(tiny):
    recipe = Recipe(
        fold=(
            Rule(["down_proj"], MPO(bond=4, sites=2)),
            Rule("mlp", LowRank(keep=0.5), exclude={"regex": r"layers\.0\."}),
            Rule("attention", Kronecker(keep=0.5), exclude=["o_proj", "k_proj"]),
            Rule("embedding", LowRank(rank=3)),
        )
    )
    plan = tensorfold.plan(tiny("llama"), recipe)
    kinds = {name: type(plan.methods[name]) for name in plan.modules}
    assert kinds["model.layers.0.mlp.down_proj"] is MPO
    assert kinds["model.layers.1.mlp.gate_proj"] is LowRank
    assert "model.layers.0.mlp.gate_proj" not in kinds
    assert kinds["model.layers.0.self_attn.q_proj"] is Kronecker
    assert not any(name.endswith(("o_proj", "k_proj")) for name in kinds)
    assert plan.modules["model.embed_tokens"].ranks == (3,)


def test_counts_are_those_of_the_folded_model(tiny):
    for architecture, tied in (("gpt2", True), ("llama", False), ("opt", True)):
        model = tiny(architecture, tied=tied)
        recipe = Recipe(fold=(Rule("embedding", LowRank(rank=4)), Rule("all-linear", MPO(keep=0.6))))
        plan = tensorfold.plan(model.config, recipe)
        report = tensorfold.fold(model, recipe)
        assert plan.parameters_after == report.parameters_after == count_parameters(model)
        assert plan.modules == report.modules


def test_a_method_that_cannot_meet_a_matrix_names_the_module():
    config = LlamaConfig(
        hidden_size=24, intermediate_size=36, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.gate_proj.*not divisible by 7"):
        tensorfold.plan(config, Kronecker(factor=(7, 4)))
    with pytest.raises(InputError, match=r"gate_proj.*keep at least"):
        tensorfold.plan(config, LowRank(keep=0.01))


def test_from_config_needs_a_config():
    with pytest.raises(InputError, match="needed a transformers model"):
        tensorfold.plan("gpt2", LowRank(keep=0.5))


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_parses_and_opens_with_its_launch_command(name):
    from tensorfold.recipes.recipe import recipe_source

    recipe = Recipe.load(name)
    assert recipe.name == name
    lines = recipe_source(name).splitlines()
    assert lines[0].startswith("# ")
    assert any(line.startswith("#   tensorfold fold") for line in lines[:4])


def test_opt_projections_outside_the_blocks_are_no_group_but_can_be_named():
    config = OPTConfig(
        vocab_size=50, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=8
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    available = matrices(model)
    assert "model.decoder.project_in" not in match("all-linear", available)
    assert match(["project_in"], available) == ["model.decoder.project_in"]


def test_auto_config_round_trip_keeps_the_plan(tmp_path):
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert tensorfold.plan(again, LowRank(keep=0.5)).to_dict() == tensorfold.plan(config, LowRank(keep=0.5)).to_dict()
