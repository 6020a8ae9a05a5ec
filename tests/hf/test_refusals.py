"""What is refused leaves the model as it was; what is subtle about orders, layers and padding stays right."""

import pytest
import torch
from transformers import AutoModelForCausalLM, SmolLM3Config

import tensorfold
from tensorfold import MPO, InputError, Kronecker, LowRank, Recipe, Rule, Spec
from tensorfold.algebra.contraction.apply import to_dense
from tensorfold.algebra.solvers.solve import fit, relative_error
from tensorfold.hf.surgery import hidden_units
from tensorfold.models.anatomy import matrices
from tensorfold.nn import MPOEmbedding, MPOLinear

ATTENTION = Rule("attention", LowRank(keep=0.5))


@pytest.mark.parametrize(
    ("rules", "layers", "text", "message"),
    [
        ([ATTENTION, Rule("mlp", Kronecker(keep=0.5, init="data-aware"))], None, False, "need calibration text"),
        ([ATTENTION, Rule("mlp", Kronecker(factor=(8, 4), init="prune"))], None, False, "does not halve"),
        ([Rule(["c_attn"], LowRank(rank=3), split=3)], None, True, "tokenizer"),
        ([Rule("embedding", Kronecker(factor=(300, 16), refine=True))], None, False, "need calibration text"),
    ],
)
def test_a_refused_fold_touches_nothing(tiny, prose, rules, layers, text, message):
    model = tiny("gpt2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        tensorfold.fold(model, Recipe(fold=tuple(rules), layers=layers), None, [prose] if text else None)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    tensorfold.fold(model, LowRank(keep=0.5))


def test_layers_are_not_dropped_from_a_model_with_nan(tiny):
    model = tiny("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"h\.1\.mlp\.c_fc.*NaN"):
        tensorfold.fold(model, Recipe(fold=(), layers=(0,)))
    assert len(model.transformer.h) == model.config.n_layer == 2


def test_frozen_weights_stay_frozen(tiny):
    model = tiny("llama").requires_grad_(False)
    tensorfold.fold(model, LowRank(keep=0.5))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_recipes_text_is_used_where_there_is_a_tokenizer(tiny, tokenizer, text_file):
    recipe = {
        "fold": [{"targets": "mlp", "method": "low-rank", "keep": 0.5}],
        "calibrate": {"text": str(text_file), "tokens": 300},
    }
    report = tensorfold.fold(tiny("llama"), recipe, tokenizer)
    assert report.calibration_tokens == 300
    with pytest.warns(UserWarning, match="no tokenizer"):
        report = tensorfold.fold(tiny("llama"), recipe)
    assert report.calibration_tokens == 0


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_tables_width_is_reordered_for_its_head_too(tiny, tmp_path, tied):
    model, ids = tiny("gpt2", tied=tied), torch.arange(20)[None]
    tensorfold.fold(model, Recipe(fold=(Rule("embedding", Kronecker(factor=(300, 16), permute="all")),)))
    table = model.transformer.wte
    assert not torch.equal(table.in_order, torch.arange(32))
    assert not tied or torch.equal(model.lm_head.to_dense(), table.to_dense())
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tensorfold.load(tmp_path)(ids).logits)


def test_orders_a_solver_does_not_give_are_the_matrix_own():
    spec = Spec.kronecker(32, 16, (16, 16), reordered=("in",))
    weight = torch.randn(32, 16)
    layer = MPOLinear.from_dense(weight, spec)
    assert layer.in_order.tolist() == list(range(16))
    plain = MPOLinear.from_dense(weight, Spec.kronecker(32, 16, (16, 16)))
    torch.testing.assert_close(layer.to_dense(), plain.to_dense())
    table = MPOEmbedding.from_dense(weight, Spec.kronecker(32, 16, (32, 8), reordered=("out", "in")))
    torch.testing.assert_close(table(torch.arange(32)), table.to_dense())
    assert spec.transposed.reordered == ("out",)
    assert spec.transposed.transposed == spec


def test_per_layer_settings_follow_their_layers(tmp_path):
    config = SmolLM3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, no_rope_layers=[1, 0, 1, 0], layer_types=["full_attention"] * 4, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    tensorfold.fold(model, Recipe(fold=(), layers=(1, 2, 3)))
    model.save_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    again = tensorfold.load(tmp_path)
    assert list(again.config.no_rope_layers) == [0, 1, 0]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_padded_low_rank_modes_can_be_calibrated():
    method = MPO(bond=3, out_modes=(10, 1), in_modes=(1, 12))
    spec = method.spec(9, 12)
    weight, inputs = torch.randn(9, 12), torch.randn(50, 12)
    metric = inputs.T @ inputs / 50
    approximation = to_dense(fit(weight, spec, metric), spec)
    exact = to_dense(fit(weight, Spec.low_rank(9, 12, 3), metric), Spec.low_rank(9, 12, 3))
    assert relative_error(weight, approximation, metric) < 1.02 * relative_error(weight, exact, metric)


def test_a_norm_over_the_hidden_units_keeps_them_in_place(tiny):
    model = tiny("llama")
    assert len(hidden_units(model, matrices(model))) == 2
    model.model.layers[0].mlp.inner_norm = torch.nn.LayerNorm(48)
    assert len(hidden_units(model, matrices(model))) == 1


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"fold": [{"targets": None, "method": "low-rank", "keep": 0.5}]}, "no targets"),
        ({"fold": [{"targets": "mlp", "method": ["low-rank"], "keep": 0.5}]}, "is unknown"),
        ({"fold": [{"targets": "mlp", "method": "low-rank", "keep": 0.5}], "heal": [None]}, "empty stage"),
        ({"layers": [True]}, "list of block indices"),
    ],
)
def test_malformed_recipes(recipe, message):
    with pytest.raises(InputError, match=message):
        Recipe.from_dict(recipe)
