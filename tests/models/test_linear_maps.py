"""Linear layers are known by what they compute, and weights that are computed themselves are refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import AutoModelForCausalLM, FalconConfig, GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.pytorch_utils import Conv1D

import tensorfold
from tensorfold import InputError, LowRank, Recipe, Rule
from tensorfold.models.anatomy import dense_weight, is_plain_linear

MLP = Recipe([Rule("mlp", LowRank(keep=0.5))])
IDS = torch.randint(2, 200, (2, 12), generator=torch.Generator().manual_seed(0))
SMALL = {"vocab_size": 260, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


class Product(nn.Linear):
    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Einsum(nn.Module):
    """No subclass, and the weight stored as (in, out)."""

    def __init__(self, in_size, out_size, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_size, out_size))
        self.bias = nn.Parameter(torch.randn(out_size)) if bias else None

    def forward(self, x):
        y = torch.einsum("...i,io->...o", x, self.weight)
        return y if self.bias is None else y + self.bias


class Scaled(nn.Linear):
    scale = 1.0

    def forward(self, x):
        return self.scale * super().forward(x)


class Doubled(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias) * 2


class Clamped(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-40, 40)


class Dropping(nn.Linear):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class Router(nn.Linear):
    def forward(self, x):
        scores = super().forward(x)
        return scores.softmax(-1), scores


class Grouped(nn.Linear):
    def forward(self, x, groups):
        return super().forward(x) * groups


def scaled(factor):
    layer = Scaled(4, 6)
    layer.scale = factor
    return layer


def patched():
    layer = nn.Linear(4, 6)
    layer.forward = lambda x: F.linear(x, layer.weight).relu()
    return layer


LINEAR = {
    "nn.Linear": lambda: nn.Linear(4, 6),
    "Conv1D": lambda: Conv1D(6, 4),
    "product": lambda: Product(4, 6),
    "product-no-bias": lambda: Product(4, 6, bias=False),
    "einsum": lambda: Einsum(4, 6),
    "einsum-no-bias": lambda: Einsum(4, 6, bias=False),
    "scaled-by-one": lambda: scaled(1.0),
    "in-half": lambda: Product(4, 6).half(),
    "eval": lambda: Product(4, 6).eval(),
}
OTHER = {
    "scaled": lambda: scaled(0.5),
    "doubled": lambda: Doubled(4, 6),
    "clamped": lambda: Clamped(4, 6),
    "dropping": lambda: Dropping(4, 6).eval(),
    "router": lambda: Router(4, 6),
    "grouped": lambda: Grouped(4, 6),
    "patched": patched,
    "embedding": lambda: nn.Embedding(6, 4),
    "bilinear": lambda: nn.Bilinear(4, 4, 6),
    "norm": lambda: nn.LayerNorm(4),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("make", LINEAR)
def test_what_computes_a_linear_map_is_one(make, device):
    layer = LINEAR[make]().to(device)
    with torch.device(device):
        assert is_plain_linear(layer)
    assert tuple(dense_weight(layer).shape) == (6, 4)
    if device == "cpu" and layer.weight.dtype == torch.float32:
        x = torch.randn(3, 4)
        torch.testing.assert_close(layer(x), F.linear(x, dense_weight(layer), layer.bias))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("make", OTHER)
def test_what_computes_anything_else_is_none(make, device):
    assert not is_plain_linear(OTHER[make]().to(device))


def falcon(**settings):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FalconConfig(**SMALL, **settings)).eval()


@pytest.mark.parametrize("bias", [True, False])
def test_falcon_folds_and_comes_back(bias, tmp_path):
    model = falcon(bias=bias)
    with torch.no_grad():
        want = model(IDS).logits
        tensorfold.fold(model, Recipe([Rule("all-linear", LowRank(rank=48))]))
        torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-5)
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(tensorfold.load(tmp_path)(IDS).logits, model(IDS).logits, rtol=0, atol=0)
    dense = falcon(bias=bias)
    before = sum(p.numel() for p in dense.parameters())
    planned = tensorfold.plan(dense.config, MLP)
    tensorfold.fold(dense, MLP)
    assert planned.parameters_after == sum(p.numel() for p in dense.parameters()) < before


def test_falcon_in_int8():
    model = falcon()
    with torch.no_grad():
        want = model(IDS).logits
        report = tensorfold.quantize(model)
        assert report.bytes_after < 0.5 * report.bytes_before
        assert (model(IDS).logits - want).abs().max() < 0.1 * want.abs().max()


EXPERTS = {
    "mixtral": MixtralConfig(**SMALL, num_key_value_heads=2, intermediate_size=32, num_local_experts=4),
    "qwen3": Qwen3MoeConfig(**SMALL, num_key_value_heads=2, moe_intermediate_size=32, num_experts=4, head_dim=12),
    "gpt-oss": GptOssConfig(**SMALL, num_key_value_heads=2, intermediate_size=32, num_local_experts=4, head_dim=12),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_fused_experts_are_named_where_another_target_passes_them_over(name):
    with pytest.raises(InputError, match="matches nothing") as caught:
        tensorfold.plan(EXPERTS[name], MLP)
    for word in ("gate_up_proj", "down_proj", "targets: experts", "mlp.experts"):
        assert word in str(caught.value)


def test_layers_with_another_forward_are_named_with_the_reason(tiny):
    model = tiny("llama")
    for block in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(block.mlp, name).__class__ = Doubled
    with pytest.raises(InputError, match=r"gate_proj: the forward of Doubled is not x Wᵀ \+ b"):
        tensorfold.fold(model, MLP)


class Symmetric(nn.Module):
    def forward(self, weight):
        return (weight + weight.flip(0)) / 2


def pre_hook(change):
    return lambda layer: layer.register_forward_pre_hook(change)


def rounded(layer, _):
    layer.weight.data = layer.weight.data.round(decimals=2)


def recomputed(layer):
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight


COMPUTED = {
    "mask": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "prune.remove"),
    "structured": (lambda layer: prune.ln_structured(layer, "weight", 0.5, n=2, dim=0), "prune.remove"),
    "identity": (lambda layer: prune.identity(layer, "weight"), "prune.remove"),
    "weight-norm": (parametrizations.weight_norm, "remove_parametrizations"),
    "spectral-norm": (parametrizations.spectral_norm, "remove_parametrizations"),
    "orthogonal": (parametrizations.orthogonal, "remove_parametrizations"),
    "parametrize": (
        lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric()),
        "remove_parametrizations",
    ),
    "old-weight-norm": (nn.utils.weight_norm, "remove_weight_norm"),
    "old-spectral-norm": (nn.utils.spectral_norm, "remove_spectral_norm"),
    "assigned": (recomputed, "nn.Parameter"),
    "hook-on-weight": (pre_hook(rounded), "remove()"),
    "hook-on-inputs": (pre_hook(lambda _, inputs: (inputs[0] * 2,)), "remove()"),
    "hook-on-outputs": (lambda layer: layer.register_forward_hook(lambda *args: args[2] + 1), "remove()"),
}
DOING = {
    "fold": lambda model: tensorfold.fold(model, MLP),
    "plan": lambda model: tensorfold.plan(model, MLP),
    "quantize": tensorfold.quantize,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("doing", DOING)
@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_are_refused_with_the_remedy(kind, doing, tiny):
    model = tiny("llama")
    change, remedy = COMPUTED[kind]
    change(model.model.layers[1].mlp.down_proj)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.down_proj: ") as caught:
        DOING[doing](model)
    assert remedy in str(caught.value)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear


def test_what_the_message_says_makes_a_masked_model_fold(tiny):
    model = tiny("llama")
    for block in model.model.layers:
        prune.l1_unstructured(block.mlp.down_proj, "weight", 0.5)
        parametrizations.weight_norm(block.mlp.up_proj)
    with torch.no_grad():
        want = model(IDS).logits
    for block in model.model.layers:
        prune.remove(block.mlp.down_proj, "weight")
        parametrize.remove_parametrizations(block.mlp.up_proj, "weight")
    tensorfold.fold(model, Recipe([Rule("mlp", LowRank(rank=32))]))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, want, rtol=1e-3, atol=1e-4)


def test_hooks_that_only_look_do_not_matter(tiny):
    model, seen = tiny("llama"), []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, _: seen.append(module))
    tensorfold.fold(model, MLP)
