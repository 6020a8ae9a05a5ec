"""PEFT's LoRA on folded models: on dense layers beside folded ones, on folded ones, and what is refused."""

import importlib.util

import pytest
import torch

import tensorfold
from tensorfold import LowRank, Recipe, Rule
from tensorfold.errors import InputError
from tensorfold.nn import MPOLinear

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft: pip install peft"),
    # What peft says of every layer that it has not made itself.
    pytest.mark.filterwarnings("ignore:Unsupported layer type", "ignore:.is_gradient_checkpointing. is deprecated"),
]

IDS = torch.arange(2, 34).reshape(2, 16)


def adapted(model, targets, **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **options))


def take_steps(model, steps=3):
    """Train what asks for gradients; returns the loss before each step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("targets", ["dense", "folded", "both"])
def test_train_save_and_load_an_adapter(folded_directory, tmp_path, targets):
    """Attention is dense there, MLP and table are folded; an adapter trains, and comes back with equal logits."""
    from peft import PeftModel

    dense, folded = ["q_proj", "v_proj"], ["up_proj", "down_proj"]
    names = {"dense": dense, "folded": folded, "both": dense + folded}
    model = tensorfold.load(folded_directory)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    plain = model(IDS).logits.detach()
    peft = adapted(model, names[targets])
    torch.testing.assert_close(peft(input_ids=IDS).logits, plain)
    assert all(("lora_" in name) == parameter.requires_grad for name, parameter in peft.named_parameters())
    losses = take_steps(peft)
    assert losses[-1] < losses[0]
    peft.save_pretrained(tmp_path / "adapter")
    expected = peft.eval()(input_ids=IDS).logits
    assert not torch.allclose(expected, plain)

    again = PeftModel.from_pretrained(tensorfold.load(folded_directory), tmp_path / "adapter").eval()
    assert torch.equal(again(input_ids=IDS).logits, expected)
    loaded = {
        name.replace("base_model.model.", "").replace("base_layer.", ""): p for name, p in again.named_parameters()
    }
    assert all(torch.equal(loaded[name], parameter) for name, parameter in before.items())
    with again.disable_adapter():
        torch.testing.assert_close(again(input_ids=IDS).logits, plain)


def test_all_linear_means_the_dense_ones(folded_directory):
    """peft's name for every linear layer knows torch's own, so folded layers have to be named."""
    peft = adapted(tensorfold.load(folded_directory), "all-linear")
    reached = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in peft.named_parameters() if "lora_A" in name}
    assert reached == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_an_adapter_has_the_layers_dtype(tiny):
    model = tiny("llama").to(torch.bfloat16)
    tensorfold.fold(model, LowRank(keep=0.5))
    peft = adapted(model, ["up_proj"])
    assert peft(input_ids=IDS).logits.dtype == torch.bfloat16
    peft.add_adapter("second", peft.peft_config["default"])
    peft.set_adapter("second")
    assert peft(input_ids=IDS).logits.dtype == torch.bfloat16


def test_parts_of_a_fused_matrix_are_targets(tiny):
    model = tiny("gpt2")
    tensorfold.fold(model, Recipe((Rule(["c_attn"], LowRank(keep=0.5), split=3),)))
    with pytest.raises(InputError, match="kept as 3 parts"):
        adapted(model, ["c_attn"])
    peft = adapted(model, ["c_attn.0", "c_attn.2"])
    assert sum(isinstance(module.base_layer, MPOLinear) for module in peft.modules() if hasattr(module, "lora_A")) == 4


@pytest.mark.parametrize(
    ("targets", "options", "says"),
    [
        (["embed_tokens"], {}, "folded MPOEmbedding"),
        (["up_proj"], {"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        (["up_proj"], {"use_dora": True}, "use_dora=True"),
    ],
)
def test_what_cannot_be_adapted_is_refused(folded_directory, targets, options, says):
    with pytest.raises(InputError, match=says):
        adapted(tensorfold.load(folded_directory), targets, **options)


def test_an_adapter_is_not_merged_into_cores(folded_directory):
    peft = adapted(tensorfold.load(folded_directory), ["up_proj"])
    with pytest.raises(InputError, match="no dense weight to merge"):
        peft.merge_and_unload()
