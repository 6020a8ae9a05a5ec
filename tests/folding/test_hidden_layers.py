"""MLPs that lose hidden units in a search: which, what is left, and where units do not work by themselves."""

from dataclasses import replace

import pytest
import torch

import tensorfold
from tensorfold import Auto
from tensorfold.calibration.block_stream import BlockStream
from tensorfold.folding import in_memory as folding
from tensorfold.folding.hidden_layers import hidden_layers
from tensorfold.methods import auto
from tensorfold.models.anatomy import by_block, matrices

TEXT = {"calibration_tokens": 1024}


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    """Units alone, and metrics as they are, so that what is not used is not asked for."""
    effort = replace(auto.EFFORTS["medium"], shrink=0.0, units=True)
    monkeypatch.setitem(auto.EFFORTS, "medium", effort)


def with_doubles(model):
    """Every second hidden unit is the one before it once more, so that half of them do."""
    for matrix in matrices(model).values():
        if matrix.group != "mlp":
            continue
        weight = matrix.module.weight.data
        weight = weight.T if type(matrix.module).__name__ == "Conv1D" else weight
        side = weight if matrix.out_features > matrix.in_features else weight.T
        side[1::2] = side[::2]
        if matrix.bias is not None and matrix.out_features > matrix.in_features:
            matrix.bias.data[1::2] = matrix.bias.data[::2]
    return model


def distance(model, other):
    ids = torch.arange(20, 84).reshape(2, 32)
    with torch.no_grad():
        wanted = other(ids).logits
        return float((model(ids).logits - wanted).norm() / (wanted - wanted.mean()).norm())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi", "gemma3"])
def test_units_go_that_others_stand_in_for(tiny, tokenizer, prose, architecture, tmp_path):
    dense, model = with_doubles(tiny(architecture)), with_doubles(tiny(architecture))
    report = tensorfold.fold(model, Auto(keep=0.5, floor=0.1), tokenizer, [prose], **TEXT)
    sizes = {max(choice.rows, choice.columns) for choice in report.choices.values()}
    whole = next(m for m in matrices(dense).values() if m.group == "mlp")
    assert sizes == {max(whole.out_features, whole.in_features) // 2}
    assert distance(model, dense) < 0.08  # what the ridge of the regression leaves
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    assert report.plan.kept <= 0.5
    model.save_pretrained(tmp_path / "out")
    loaded = tensorfold.load(tmp_path / "out")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert distance(loaded, model) < 1e-6


def test_all_matrices_of_an_mlp_keep_the_same_units(tiny, tokenizer, prose):
    model = with_doubles(tiny("llama"))
    tensorfold.fold(model, Auto(keep=0.5, floor=0.1), tokenizer, [prose], **TEXT)
    for block in model.model.layers:
        gate, up, down = (getattr(block.mlp, f"{name}_proj").to_dense() for name in ("gate", "up", "down"))
        used = gate.abs().sum(1) > 0
        assert int(used.sum()) == len(gate) // 2
        assert torch.equal(up.abs().sum(1) > 0, used)
        assert torch.equal(down.abs().sum(0) > 0, used)


def test_what_it_costs_is_told(tiny, tokenizer, prose):
    report = tensorfold.fold(tiny("llama"), Auto(keep=0.6), tokenizer, [prose], **TEXT)
    rivals = {name: choice.rivals for name, choice in report.choices.items()}
    assert all(rivals.values())
    assert all(0 <= error < float("inf") for each in rivals.values() for error in each.values())


@pytest.mark.parametrize("change", ["nothing", "norm", "softmax"])
def test_units_that_see_each_other_stay(tiny, change):
    model = tiny("llama")
    if change != "nothing":

        class Mixing(torch.nn.Module):
            def forward(self, x):
                return torch.nn.functional.layer_norm(x, x.shape[-1:]) if change == "norm" else x.softmax(-1)

        for block in model.model.layers:
            block.mlp.act_fn = Mixing()
    with torch.no_grad():
        stream = BlockStream(model, torch.arange(24).reshape(1, 24))
        found = hidden_layers(stream, 0, by_block(matrices(model), stream.name)[0])
    assert len(found) == (change == "nothing")


def test_bytes_and_low_effort_leave_them_alone(tiny, tokenizer, prose):
    for method in (Auto(keep=0.5, budget="bytes"), Auto(keep=0.5, effort="low")):
        report = tensorfold.fold(with_doubles(tiny("llama")), method, tokenizer, [prose], **TEXT)
        assert not any(choice.rows or choice.columns for choice in report.choices.values())


def test_an_interrupted_fold_keeps_the_units(tiny, tokenizer, prose, tmp_path, monkeypatch):
    def folded(**more):
        model = with_doubles(tiny("llama"))
        return model, tensorfold.fold(model, Auto(keep=0.45, floor=0.1), tokenizer, [prose], **TEXT, **more)

    whole, report = folded()
    assert any(choice.rows for choice in report.choices.values())
    real = folding.swap

    def dies(model, matrix, module):
        if "layers.1" in matrix.name:
            raise KeyboardInterrupt
        real(model, matrix, module)

    with monkeypatch.context() as patch:
        patch.setattr(folding, "swap", dies)
        with pytest.raises(KeyboardInterrupt):
            folded(checkpoint=tmp_path / "kept")
    resumed, again = folded(checkpoint=tmp_path / "kept")
    assert again.choices == report.choices
    assert all(torch.equal(whole.state_dict()[key], value) for key, value in resumed.state_dict().items())
