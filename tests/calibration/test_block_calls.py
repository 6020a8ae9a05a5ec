"""Blocks run one by one get the inputs that they get in the whole model; a model for each way of passing them.

A sweep over every causal language model type of transformers found the ways (``studies/reliability/streams.py``).
"""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    HrmTextConfig,
    JambaConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    MllamaForCausalLM,
    MllamaTextConfig,
    OpenAIGPTConfig,
    XLMConfig,
    XLNetConfig,
    ZayaConfig,
)

import tensorfold
from tensorfold import Auto, Graded, InputError, LowRank, Recipe, Rule
from tensorfold.calibration.block_stream import BlockStream, input_moments
from tensorfold.calibration.gradient_walk import walk_gradient_moments
from tensorfold.calibration.gradients import gradient_moments
from tensorfold.calibration.windows import calibration_windows
from tensorfold.healing.blockwise import heal_blocks
from tensorfold.models.anatomy import blocks, by_block, matrices
from tensorfold.models.modes import evaluation_mode
from tensorfold.recipes.settings import HealSettings
from tensorfold.utils import torch_modes

TOKENS = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": 128, **TOKENS}
HEADS = {"num_key_value_heads": 2, "head_dim": 8}
BY_LAYER = {"vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 8}
KINDS = ["sliding_attention", "full_attention"]

CONFIGS = {
    # Blocks are given embeddings of the tokens beside the hidden states, and later blocks read keys of earlier ones.
    "gemma4": Gemma4TextConfig(num_hidden_layers=4, num_kv_shared_layers=2, global_head_dim=8, layer_types=KINDS * 2,
                               **SIZES, **HEADS, **BY_LAYER),
    # There are four hidden states a token, on an axis before the batch.
    "gemma3n": Gemma3nTextConfig(num_hidden_layers=4, num_kv_shared_layers=2, layer_types=KINDS * 2, laurel_rank=4,
                                 **{**SIZES, "intermediate_size": [48] * 4}, **HEADS, **BY_LAYER),
    # A block returns router states for the next one.
    "zaya": ZayaConfig(num_hidden_layers=3, num_experts=4, num_experts_per_tok=1, moe_intermediate_size=48,
                       router_hidden_size=16, layer_types=["hybrid"] * 3, **SIZES, **HEADS),
    # Blocks of two classes.
    "jamba": JambaConfig(num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, num_experts=2,
                         expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8, num_key_value_heads=2,
                         use_mamba_kernels=False, **SIZES),
    # The batch is the second axis.
    "xlnet": XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=48, **TOKENS),
    # Blocks return lists.
    "openai-gpt": OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=4, n_positions=128, **TOKENS),
    "llama": LlamaConfig(num_hidden_layers=3, **SIZES, **HEADS),
}  # fmt: skip


class ByKeyword(nn.Module):
    """An MLP that names the arguments of its layers."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x):
        return self.down_proj(input=nn.functional.silu(self.gate_proj(input=x)) * self.up_proj(input=x))


def make(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama" if name == "by keyword" else name]).eval()
    for parameter in model.parameters():  # parameters that begin as zeros or ones would hide wrong inputs
        if parameter.is_floating_point() and bool((parameter == parameter.flatten()[0]).all()):
            parameter.data += 0.2 * torch.randn_like(parameter)
    if name == "by keyword":
        for block in model.model.layers:
            block.mlp = ByKeyword(block.mlp)
    return model


@pytest.mark.parametrize("name", [*CONFIGS, "by keyword"])
def test_every_layer_of_every_block_is_measured_on_its_inputs_in_the_whole_model(name, tokenizer, prose):
    model = make(name)
    windows = calibration_windows(tokenizer, [prose], 150, 50)
    with evaluation_mode(model), torch.no_grad():
        stream = BlockStream(model, windows)
        inside = by_block({n: m for n, m in matrices(model).items() if m.kind == "linear"}, stream.name)
        modules = {n: m.module for batch in inside.values() for n, m in batch.items()}
        expected = input_moments(lambda: [model(w[None], use_cache=False) for w in windows], modules, False)
        for index, batch in inside.items():
            stream.advance_to(index)
            met = {n: m.module for n, m in batch.items() if n in expected}
            for layer, moment in stream.input_moments(index, met).items():
                torch.testing.assert_close(moment, expected[layer], rtol=1e-4, atol=1e-6, msg=layer)
    assert len(inside) == len(stream.blocks)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_go_back_by_all_that_blocks_hand_on(name):
    model, found = make(name), {}
    windows = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    inside = by_block({n: m for n, m in matrices(model).items() if m.kind == "linear"}, blocks(model)[0])
    modules = {n: m.module for batch in inside.values() for n, m in batch.items()}
    with evaluation_mode(model):
        expected = gradient_moments(model, windows, modules, drawn=True)
        walk_gradient_moments(
            model, windows, modules, 0, False, lambda shape, dtype: torch.empty(shape, dtype=dtype), found.update
        )
    assert found.keys() == expected.keys()
    for layer, moment in expected.items():
        scale = float(moment.values.abs().max())
        torch.testing.assert_close(found[layer].values, moment.values, rtol=1e-3, atol=1e-5 * scale, msg=layer)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("gemma4", "per_layer_projection"),
        ("gemma4", "o_proj"),
        ("gemma3n", "per_layer_projection"),
        ("gemma3n", "o_proj"),
        ("zaya", "router_mlp.fc1"),
        ("jamba", "down_proj"),
        ("xlnet", "ff.layer_2"),
        ("openai-gpt", "mlp.c_proj"),
        ("llama", "mlp.down_proj"),
        ("by keyword", "mlp.down_proj"),
    ],
)
def test_the_error_that_is_reported_is_that_on_what_the_layer_gets(name, target, tokenizer, prose):
    """With one folded layer a block, the folded model gives each layer exactly the inputs that it was measured on."""
    model = make(name)
    before = {n: matrix.module for n, matrix in matrices(model).items()}
    report = tensorfold.fold(
        model, Recipe((Rule([target], LowRank(rank=4)),)), tokenizer, [prose], calibration_tokens=300
    )
    assert len(report.modules) >= 2
    windows = calibration_windows(tokenizer, [prose], 300, 128)
    sums = {layer: [0.0, 0.0] for layer in report.modules}

    def watch(layer):
        dense = before[layer]
        weight = dense.weight.T if type(dense).__name__ == "Conv1D" else dense.weight
        change = model.get_submodule(layer).to_dense() - weight

        def hook(_, args, kwargs):
            x = args[0] if args else kwargs["input"]
            sums[layer][0] += (x @ change.T).square().sum().item()
            sums[layer][1] += (x @ weight.T).square().sum().item()

        return hook

    with torch.no_grad():
        for layer in report.modules:
            model.get_submodule(layer).register_forward_pre_hook(watch(layer), with_kwargs=True)
        for window in windows:
            model(window[None], use_cache=False)
    found = {layer: (change / whole) ** 0.5 for layer, (change, whole) in sums.items()}
    own = {layer: error for layer, error in report.errors.items() if ".experts." not in layer}  # theirs are shrunk
    assert own == pytest.approx({layer: found[layer] for layer in own}, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "effort"),
    [("gemma4", "medium"), ("gemma3n", "low"), ("openai-gpt", "medium"), ("by keyword", "low"), ("by keyword", "high")],
)
def test_every_effort_measures_them(name, effort, tokenizer, prose):
    model = make(name)
    report = tensorfold.fold(model, Auto(keep=0.6, effort=effort), tokenizer, [prose], calibration_tokens=300)
    assert report.choices
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(20)[None]).logits).all()


@pytest.mark.parametrize("name", [*CONFIGS, "by keyword"])
def test_what_a_rounded_pass_hands_on_serves_exact_passes_too(name, tokenizer, prose, monkeypatch):
    """On any processor: torch emulates products of bfloat16."""
    monkeypatch.setattr(torch_modes, "multiplies_bfloat16", lambda: True)
    model = make(name)
    streams = [BlockStream(model, calibration_windows(tokenizer, [prose], 150, 50)) for _ in range(2)]
    for stream, rounded in zip(streams, (False, True), strict=True):
        for index in range(len(stream.blocks)):
            with torch.no_grad():
                stream.run(index, slice(0, 1))  # exact, as the checks of a block's structure are
                with stream.rounded(rounded):
                    stream.advance(index)
    exact, rounded = (stream.hidden for stream in streams)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.05 * exact.norm()


class Remembering(ByKeyword):
    """A module that adds the mean of its input in the call before."""

    before = 0.0

    def forward(self, x):
        out, self.before = super().forward(x) + self.before, x.mean()
        return out


def test_what_passes_by_the_block_is_refused(tokenizer, prose):
    """State hidden in modules shows in no single window."""
    model = make("llama")
    model.model.layers[1].mlp = Remembering(model.model.layers[1].mlp)
    with pytest.raises(
        InputError, match=r"(?s)LlamaForCausalLM does not run its blocks 'model.layers' one after another"
    ):
        tensorfold.fold(model, LowRank(rank=4), tokenizer, [prose], calibration_tokens=300)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (HrmTextConfig(num_layers_per_stack=2, H_cycles=2, L_cycles=2, L_bp_cycles=[2], **SIZES), "more than once"),
        (XLMConfig(emb_dim=32, n_layers=3, n_heads=4, max_position_embeddings=128, **TOKENS), "depends on more than"),
    ],
    ids=lambda each: getattr(each, "model_type", ""),
)
def test_blocks_that_are_no_chain_are_refused(config, why, tokenizer, prose):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = Recipe((Rule("attention", LowRank(rank=4)),))
    with pytest.raises(InputError, match=f"(?s)one after another .*{why}.*without calibration text"):
        tensorfold.fold(model, recipe, tokenizer, [prose], calibration_tokens=300)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_folded_layers_take_their_input_by_name(tiny):
    """Modules may be given their input by keyword, as ``nn.Linear`` and ``nn.Embedding`` allow."""
    model = tiny("llama", tied=False)
    half = LowRank(keep=0.5)
    recipe = Recipe((Rule("all-linear", half), Rule("embedding", Graded(keep=0.5)), Rule(["lm_head"], half)))
    tensorfold.fold(model, recipe)
    x, ids = torch.randn(3, 32), torch.arange(5)
    up, table = model.model.layers[0].mlp.up_proj, model.model.embed_tokens
    assert torch.equal(up(input=x), up(x))
    assert torch.equal(table(input=ids), table(ids))
    tensorfold.quantize(model)
    up, table = model.model.layers[0].mlp.up_proj, model.model.embed_tokens
    assert torch.equal(up(input=x), up(x))
    assert torch.equal(table(input=ids), table(ids))


@pytest.fixture
def headless(tiny):
    """A model without a head and a classifier, neither of which has a loss on a text."""
    config = tiny("llama").config
    torch.manual_seed(0)
    return {
        "body": LlamaModel(config).eval(),
        "classifier": LlamaForSequenceClassification(config).eval(),
        "tagger": LlamaForTokenClassification(config).eval(),
    }


@pytest.mark.parametrize("kind", ["body", "classifier", "tagger"])
def test_models_without_a_language_models_head_are_calibrated(headless, kind, tokenizer, prose):
    report = tensorfold.fold(headless[kind], LowRank(keep=0.5), tokenizer, [prose], calibration_tokens=300)
    assert set(report.metrics.values()) == {"activation"}


@pytest.mark.parametrize("kind", ["body", "classifier", "tagger"])
@pytest.mark.parametrize("targets", ["mlp", "embedding"])
def test_what_needs_the_texts_loss_is_refused_before_anything_changes(headless, kind, targets, tokenizer, prose):
    model = headless[kind]
    names = [name for name, _ in model.named_parameters()]
    method = {"mlp": Auto(keep=0.5, effort="low"), "embedding": Graded(keep=0.5)}[targets]
    with pytest.raises(InputError, match="needed a causal language model"):
        tensorfold.fold(
            model, Recipe((Rule(targets, method),), layers=(1,)), tokenizer, [prose], calibration_tokens=300
        )
    assert [name for name, _ in model.named_parameters()] == names
    assert model.config.num_hidden_layers == 2


def mllama():
    """A model with three text blocks, the second of which attends to images."""
    text = MllamaTextConfig(num_hidden_layers=3, cross_attention_layers=[1], **SIZES, num_key_value_heads=2,
                            rope_parameters={"rope_type": "default", "rope_theta": 1e4})  # fmt: skip
    torch.manual_seed(0)
    return MllamaForCausalLM(text).eval()


def test_blocks_that_look_at_images_are_passed_over(tokenizer, prose):
    model = mllama()
    recipe = Recipe((Rule({"regex": r"layers\.[02]\.mlp"}, Auto(keep=0.5)),))
    report = tensorfold.fold(model, recipe, tokenizer, [prose], calibration_tokens=300)
    assert {name.split(".")[-3] for name in report.choices} == {"0", "2"}
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.\w+: not called on the calibration text"):
        tensorfold.fold(mllama(), LowRank(rank=4), tokenizer, [prose], calibration_tokens=300)


def test_they_are_not_healed_on_text():
    student, teacher = mllama(), mllama()
    tensorfold.fold(student, LowRank(rank=4))
    windows = torch.randint(10, 290, (3, 20), generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="text does not go through the folded block 1"):
        heal_blocks(student, teacher, windows, HealSettings(blockwise_tokens=60))
