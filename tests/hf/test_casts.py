"""Casts of folded and int8 models: every floating-point number changes its type, codes and orders do not."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM

import tensorfold
from tensorfold import Graded, LowRank, Recipe, Rule

IDS = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(0))
CASTS = {
    "half": (lambda model: model.half(), torch.float16),
    "bfloat16": (lambda model: model.bfloat16(), torch.bfloat16),
    "float": (lambda model: model.bfloat16().float(), torch.float32),
    "double": (lambda model: model.double(), torch.float64),
    "to": (lambda model: model.to(torch.float16), torch.float16),
    "to-device": (lambda model: model.to("cpu", dtype=torch.bfloat16).cpu(), torch.bfloat16),
}
COPIES = {
    "itself": lambda model, path: model,
    "pickled": lambda model, path: pickle.loads(pickle.dumps(model)),
    "copied": lambda model, path: copy.deepcopy(model),
    "loaded": lambda model, path: (model.save_pretrained(path), AutoModelForCausalLM.from_pretrained(path))[1],
}


@pytest.fixture(params=[False, True], ids=["folded", "int8"])
def model(request, tiny):
    model = tiny("llama")
    rules = [Rule("all-linear", LowRank(keep=0.6, pivots=True)), Rule("embedding", Graded(keep=0.5))]
    tensorfold.fold(model, Recipe(rules))
    if request.param:
        tensorfold.quantize(model)
    return model.eval()


@pytest.mark.parametrize("of", COPIES)
@pytest.mark.parametrize("cast", CASTS)
def test_casts_change_floating_point_numbers_only(cast, of, model, tmp_path):
    before, want = {k: v.clone() for k, v in model.state_dict().items()}, model(IDS).logits
    made = COPIES[of](model, tmp_path / "saved")
    to, dtype = CASTS[cast]
    cast_model = to(made)
    assert cast_model is made
    for name, tensor in made.state_dict().items():
        if before[name].is_floating_point():
            assert tensor.dtype == dtype
        else:
            assert torch.equal(tensor, before[name])
    with torch.no_grad():
        torch.testing.assert_close(made(IDS).logits.float(), want, rtol=0.1, atol=0.1)


def test_a_copy_casts_itself(model):
    other = copy.deepcopy(model).half()
    assert {p.dtype for p in other.parameters() if p.is_floating_point()} == {torch.float16}
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}


def test_adapters_of_folded_models_learn_through_checkpointed_blocks(tiny):
    from peft import LoraConfig, get_peft_model

    model = tiny("llama")
    tensorfold.fold(model, Recipe([Rule("mlp", LowRank(keep=0.5))]))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).train()
    adapted(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for name, p in adapted.named_parameters() if "lora_" in name)
