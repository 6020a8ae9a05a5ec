"""Gradient moments against sums over the gradients that autograd gives, written out here."""

import pytest
import torch
import torch.nn.functional as F

from tensorfold.calibration import gradients
from tensorfold.calibration.gradients import gradient_moments

WINDOWS = torch.randint(5, 290, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_moments_are_sums_over_tokens(tiny, architecture):
    model = tiny(architecture).eval()
    table = model.get_input_embeddings()
    expected = torch.zeros(table.embedding_dim, table.embedding_dim)
    for window in WINDOWS:
        seen = []
        handle = table.register_forward_hook(lambda _, __, out, seen=seen: (out.retain_grad(), seen.append(out))[0])
        logits = model(window[None], use_cache=False).logits[0]
        handle.remove()
        F.cross_entropy(logits[:-1], window[1:], reduction="sum").backward()
        gradient = seen[0].grad[0]
        expected += gradient.T @ gradient
    model.zero_grad()
    with torch.no_grad():  # as folding calls it
        moments = gradient_moments(model, WINDOWS, {"table": table})
    torch.testing.assert_close(moments["table"].full(), expected / WINDOWS.numel(), rtol=1e-4, atol=1e-7)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_linear_layers_have_their_outputs_side(tiny):
    model = tiny("llama").eval()
    layer = model.model.layers[0].mlp.down_proj
    expected = torch.zeros(layer.out_features, layer.out_features)
    for window in WINDOWS:
        seen = []
        handle = layer.register_full_backward_hook(lambda _, __, out, seen=seen: seen.append(out[0][0]))
        F.cross_entropy(model(window[None], use_cache=False).logits[0, :-1], window[1:], reduction="sum").backward()
        handle.remove()
        expected += seen[0].T @ seen[0]
    moment = gradient_moments(model, WINDOWS, {"down": layer})["down"].full()
    torch.testing.assert_close(moment, expected / WINDOWS.numel(), rtol=1e-4, atol=1e-7)


def test_long_windows_are_cut_and_nothing_is_left_out(tiny, monkeypatch):
    model = tiny("llama").eval()
    layer = model.model.layers[0].mlp.down_proj
    monkeypatch.setattr(gradients, "_WINDOW", 5)
    moment = gradient_moments(model, WINDOWS, {"down": layer})["down"].full()
    parts = [
        gradient_moments(model, part, {"down": layer})["down"].full() * part.numel() for part in WINDOWS.split(5, dim=1)
    ]
    torch.testing.assert_close(moment, sum(parts) / WINDOWS.numel(), rtol=1e-4, atol=1e-7)


def test_a_module_that_is_not_used_has_none(tiny):
    assert gradient_moments(tiny("llama").eval(), WINDOWS, {"elsewhere": torch.nn.Linear(2, 2)}) == {}


def test_products_in_bfloat16_give_nearly_the_same_moments(tiny, monkeypatch):
    """Whatever processor the test runs on: torch emulates the products where it has no instructions for them."""
    monkeypatch.setattr(gradients, "multiplies_bfloat16", lambda: True)
    model = tiny("llama").eval()
    named = {"down": model.model.layers[0].mlp.down_proj, "q": model.model.layers[1].self_attn.q_proj}
    exact, rounded = (gradient_moments(model, WINDOWS, named, rounded=each) for each in (False, True))
    for name in named:
        difference = (exact[name].full() - rounded[name].full()).norm() / exact[name].full().norm()
        assert 0 < difference < 0.02
        assert rounded[name].values.dtype == torch.float32


def test_next_tokens_that_are_drawn_give_the_fisher_matrix_of_the_predictions():
    """``E g gᵀ = diag p − p pᵀ`` at the logits, whatever the text says."""
    piece = torch.zeros(8001, dtype=torch.long)
    chances = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    logits = chances.log().clamp_min(-50).expand(1, len(piece), -1)
    gradient = gradients.gradient_at(logits, piece, 0, drawn=True)[0, :-1]
    fisher = chances.diag() - chances.outer(chances)
    torch.testing.assert_close(gradient.T @ gradient / len(gradient), fisher, rtol=0, atol=0.02)
    assert torch.equal(gradient, gradients.gradient_at(logits, piece, 0, drawn=True)[0, :-1])
    of_the_text = gradients.gradient_at(logits, piece, 0)[0, :-1]
    torch.testing.assert_close(of_the_text, (chances - torch.eye(5)[0]).expand(8000, -1))
