"""Experts: what is known of layers that are sent some of the tokens, or none."""

import warnings

import pytest
import torch
from torch import nn

import tensorfold
from tensorfold import Auto, InputError
from tensorfold.calibration.windows import calibration_windows
from tensorfold.folding import in_memory as folding
from tensorfold.folding import rank_search as search
from tensorfold.methods.auto import EFFORTS, Effort


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 48, bias=False), nn.Linear(48, 32, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Routed(nn.Module):
    """Two experts: the second gets the tokens whose feature 0 is above a threshold."""

    def __init__(self):
        super().__init__()
        self.threshold, self.calls_idle = 0.0, False
        self.experts = nn.ModuleList([Expert(), Expert()])

    def forward(self, x):
        flat = x.flatten(0, -2)
        out = torch.zeros_like(flat)
        second = flat[:, 0] > self.threshold
        for expert, mine in zip(self.experts, (~second, second), strict=True):
            if mine.any() or self.calls_idle:
                out[mine] = expert(flat[mine])
        return out.view_as(x)


@pytest.fixture
def routed(tiny, tokenizer, prose):
    """``routed()``: a model whose second experts get a few tokens, none of them in the first window of the text."""

    @torch.no_grad()
    def make(never=False, calls_idle=False):
        model = tiny("llama")
        torch.manual_seed(1)
        for block in model.model.layers:
            block.mlp = Routed()
            block.mlp.threshold, block.mlp.calls_idle = float("inf"), calls_idle
        model.eval()
        windows = calibration_windows(tokenizer, [prose], 512, 128)
        for block in [] if never else model.model.layers:
            seen = []
            handle = block.mlp.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][..., 0]))
            for window in windows:
                model(window[None], use_cache=False)
            handle.remove()
            feature = torch.cat(seen)  # (windows, length)
            block.mlp.threshold = float(feature[0].max())
            assert (feature[1:] > feature[0].max()).any()
        return model

    return make


@pytest.fixture(autouse=True)
def _small_sample(monkeypatch):
    """Gradients at low and medium effort look at one window; models made by hand are folded."""
    monkeypatch.setattr(folding, "check_described", lambda _: None)
    small = {name: Effort(128, each.staged, each.feedback) for name, each in EFFORTS.items() if name != "high"}
    monkeypatch.setattr(search, "EFFORTS", {**EFFORTS, **small})


@pytest.mark.parametrize("calls_idle", [False, True], ids=["idle experts are not called", "or with no token"])
@pytest.mark.parametrize("effort", ["low", "medium"])
def test_an_expert_that_the_sample_does_not_meet_is_fitted_to_its_inputs(routed, tokenizer, prose, effort, calls_idle):
    model = routed(calls_idle=calls_idle)
    with pytest.warns(UserWarning, match=r"4 layers are not called on 128 tokens.*experts\.1\.up"):
        report = tensorfold.fold(model, Auto(keep=0.5, effort=effort), tokenizer, [prose], calibration_tokens=512)
    idle = {name for name in report.modules if "experts.1" in name}
    assert len(idle) == 4
    assert {report.metrics[name] for name in idle} == {"activation"}
    assert {report.metrics[name] for name in report.modules.keys() - idle} == {"loss"}
    assert not idle & report.choices.keys()
    assert report.plan.kept <= 0.5


def test_high_effort_meets_it(routed, tokenizer, prose):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        report = tensorfold.fold(routed(), Auto(keep=0.5, effort="high"), tokenizer, [prose], calibration_tokens=512)
    assert sum("experts.1" in name for name in report.choices) == 4


@pytest.mark.parametrize("effort", ["low", "medium", "high"])
def test_one_that_no_text_meets_is_refused_by_name(routed, tokenizer, prose, monkeypatch, effort):
    monkeypatch.setattr(folding, "solve_matrix", None)  # before anything is folded
    with pytest.raises(InputError, match=r"experts\.1\.up: not called on the calibration text.*exclude it"):
        tensorfold.fold(routed(never=True), Auto(keep=0.5, effort=effort), tokenizer, [prose], calibration_tokens=512)
