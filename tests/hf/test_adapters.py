"""peft on folded and quantised models beyond plain LoRA, and models with adapters handed to us."""

import importlib.util

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tensorfold
from tensorfold import InputError
from tensorfold.export.checkpoints import export_dense, export_onnx

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft: pip install peft"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type", "ignore:.is_gradient_checkpointing. is deprecated"),
]

IDS = torch.arange(3, 11)[None]
MLP = {"targets": "mlp", "method": "low-rank", "keep": 0.5}
TABLES = {
    "low rank": {"targets": "embedding", "method": "low-rank", "rank": 9},
    "graded": {"targets": "embedding", "method": "graded", "keep": 0.6},
    "a chain a token": {"targets": "embedding", "method": "token-mps", "modes": [4, 8], "rank": 2},
}


def llama(tied=True):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=4, max_position_embeddings=64, tie_word_embeddings=tied)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def folded(table, int8=False):
    model = llama()
    tensorfold.fold(model, {"fold": [MLP, table]})
    if int8:
        tensorfold.quantize(model)
    return model


@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_prompt_tuning_trains_on_a_folded_table(table, int8):
    from peft import PromptTuningConfig, get_peft_model

    model = folded(table, int8)
    states = model.get_input_embeddings()(IDS)
    peft = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    assert torch.equal(peft.word_embeddings(IDS), states)
    loss = peft(input_ids=IDS, labels=IDS).loss
    loss.backward()
    trained = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    assert [tuple(parameter.shape) for parameter in trained] == [(4, 32)]
    assert trained[0].grad.abs().sum() > 0
    assert "get_submodule" not in model.__dict__


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_trainable_tokens_of_a_folded_table_are_refused(table):
    from peft import LoraConfig, TrainableTokensConfig, get_peft_model

    for config in (
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=[5]),
        TrainableTokensConfig(token_indices=[5], target_modules=["embed_tokens"]),
    ):
        with pytest.raises(InputError, match=r"trainable tokens.*dense table"):
            get_peft_model(folded(table), config)


@pytest.mark.parametrize("targets", [["q_proj"], ["up_proj"], ["embed_tokens"]], ids=str)
def test_lora_on_int8_is_refused(targets):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", target_modules=targets)
    with pytest.raises(InputError, match=r"LoRA.*int8.*floating-point"):
        get_peft_model(folded(TABLES["low rank"], int8=True), config)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["embed_tokens"]], ids=str)
@pytest.mark.parametrize(
    "act",
    [
        lambda model, out: tensorfold.fold(model, {"fold": [MLP]}),
        lambda model, out: tensorfold.plan(model, {"fold": [MLP]}),
        lambda model, out: tensorfold.quantize(model),
        lambda model, out: export_dense(model, out),
        lambda model, out: export_onnx(model, out),
    ],
    ids=["fold", "plan", "quantize", "dense", "onnx"],
)
def test_a_model_with_an_adapter_is_refused_unchanged(act, targets, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = llama()
    model.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=r"adapter.*merge"):
        act(model, tmp_path / "out")
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not (tmp_path / "out").exists()
    wrapped = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", target_modules=targets))
    with pytest.raises(InputError, match=r"PeftModel.*needed a transformers model"):
        tensorfold.fold(wrapped, {"fold": [MLP]})
