"""Passes over a calibration text that round to bfloat16, on any processor: torch emulates the products."""

import pytest
import torch

import tensorfold
from tensorfold import Auto
from tensorfold.calibration.block_stream import BlockStream
from tensorfold.utils import torch_modes

WINDOWS = torch.randint(5, 290, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def with_instructions(monkeypatch):
    monkeypatch.setattr(torch_modes, "multiplies_bfloat16", lambda: True)


def states(stream, rounded):
    with torch.no_grad(), stream.rounded(rounded):
        stream.advance_to(2)
    return stream.hidden


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe"])
def test_states_are_nearly_the_same_and_stay_in_float32(tiny, architecture):
    model = tiny(architecture).eval()
    exact, rounded = (states(BlockStream(model, WINDOWS), each) for each in (False, True))
    assert rounded.dtype == torch.float32
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 2e-2


def test_layers_hand_on_bfloat16_within_the_context_only(tiny):
    model, seen = tiny("llama").eval(), []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    stream = BlockStream(model, WINDOWS)
    seen.clear()
    with torch.no_grad():
        stream.run(0, slice(0, 1))
        with stream.rounded():
            stream.run(0, slice(0, 1))
        stream.run(0, slice(0, 1))
    assert [seen[0], seen[-2], seen[-1]] == [torch.float32, torch.bfloat16, torch.float32]


def strict(*_):
    if torch.is_autocast_enabled("cpu"):
        raise RuntimeError("expected scalar type Float but found BFloat16")


def test_a_model_whose_code_does_not_bear_it_is_folded_without(tiny, tokenizer, prose):
    model = tiny("llama").eval()
    model.model.layers[1].mlp.act_fn.register_forward_pre_hook(strict)
    assert states(BlockStream(model, WINDOWS), True).isfinite().all()
    assert tensorfold.fold(model, Auto(keep=0.5), tokenizer, [prose], calibration_tokens=256).choices


def test_half_floats_are_left_as_they_are(tiny):
    model = tiny("llama").eval().half()
    model.model.layers[1].mlp.act_fn.register_forward_pre_hook(strict)
    assert states(BlockStream(model, WINDOWS), True).dtype == torch.float16


def test_running_out_of_memory_is_not_taken_for_a_fault_of_the_model(tiny):
    model = tiny("llama").eval()

    def full(*_):
        if torch.is_autocast_enabled("cpu"):
            raise torch.OutOfMemoryError("not enough memory")

    model.model.layers[1].mlp.act_fn.register_forward_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        states(BlockStream(model, WINDOWS), True)
