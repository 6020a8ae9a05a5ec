"""Steps on a folded block's output, from the closed form on."""

from dataclasses import replace

import pytest
import torch

import tensorfold
from tensorfold import Auto
from tensorfold.calibration.block_loss import least_size, relative_loss
from tensorfold.folding import in_memory as folding
from tensorfold.folding import refine
from tensorfold.methods import auto

TEXT = {"calibration_tokens": 1024}


@pytest.fixture(autouse=True)
def _refined(monkeypatch):
    monkeypatch.setitem(auto.EFFORTS, "medium", replace(auto.EFFORTS["medium"], refine=12))


def fold(tiny, tokenizer, prose, keep=0.4, **more):
    model = tiny("llama")
    return model, tensorfold.fold(model, Auto(keep=keep), tokenizer, [prose], **TEXT, **more)


def states(model, ids):
    with torch.no_grad():
        return model(ids, output_hidden_states=True).hidden_states


def test_the_error_of_every_block_falls_and_is_told(tiny, tokenizer, prose, monkeypatch):
    model, report = fold(tiny, tokenizer, prose)
    assert list(report.refined) == ["model.layers.0", "model.layers.1"]
    assert all(0 < after < before < 1 for before, after in report.refined.values())
    assert report.to_dict()["refined"] == {name: list(errors) for name, errors in report.refined.items()}
    monkeypatch.setitem(auto.EFFORTS, "medium", replace(auto.EFFORTS["medium"], refine=0))
    plain, other = fold(tiny, tokenizer, prose)
    assert not other.refined
    assert "refined" not in other.to_dict()
    ids = torch.tensor(tokenizer(prose)["input_ids"][:512]).reshape(4, 128)
    wanted = states(tiny("llama"), ids)[1]
    errors = [relative_loss(states(each, ids)[1], wanted, least_size(wanted)) for each in (model, plain)]
    assert errors[0] < errors[1]


def test_a_block_that_gets_worse_stays_as_it_came(tiny, tokenizer, prose, monkeypatch):
    monkeypatch.setattr(refine, "_RATE", 10.0)
    model, report = fold(tiny, tokenizer, prose)
    assert all(before == after for before, after in report.refined.values())
    monkeypatch.setitem(auto.EFFORTS, "medium", replace(auto.EFFORTS["medium"], refine=0))
    plain, _ = fold(tiny, tokenizer, prose)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in plain.state_dict().items())


def test_it_is_the_same_every_time_and_wants_no_gradients_afterwards(tiny, tokenizer, prose):
    first, _ = fold(tiny, tokenizer, prose)
    second, _ = fold(tiny, tokenizer, prose)
    assert all(torch.equal(value, first.state_dict()[key]) for key, value in second.state_dict().items())
    assert all(parameter.requires_grad for parameter in first.parameters())
    assert all(parameter.grad is None for parameter in first.parameters())


def test_half_precision_is_left_as_fitted(tiny, tokenizer, prose):
    model = tiny("llama").bfloat16()
    report = tensorfold.fold(model, Auto(keep=0.4), tokenizer, [prose], **TEXT)
    assert all(before == after for before, after in report.refined.values())


def test_an_interrupted_fold_goes_on_to_the_same_bytes(tiny, tokenizer, prose, tmp_path, monkeypatch):
    whole, report = fold(tiny, tokenizer, prose)
    real, refined = folding.swap, []

    def dies(model, matrix, module):
        if "layers.1" in matrix.name:
            raise KeyboardInterrupt
        real(model, matrix, module)

    with monkeypatch.context() as patch:
        patch.setattr(folding, "swap", dies)
        with pytest.raises(KeyboardInterrupt):
            fold(tiny, tokenizer, prose, checkpoint=tmp_path / "kept")
    step = refine._step
    monkeypatch.setattr(refine, "_step", lambda *given: refined.append(1) or step(*given))
    resumed, again = fold(tiny, tokenizer, prose, checkpoint=tmp_path / "kept")
    assert len(refined) == 1  # block 0 was in the checkpoint
    assert again.refined == report.refined
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())


def test_ranks_that_disagree_whether_steps_helped_send_the_same_tensors(tiny, tokenizer, prose, monkeypatch):
    sent = {}

    def broadcast(_, tensors, owner):
        sent[rate].append([tuple(tensor.shape) for tensor in tensors])

    monkeypatch.setattr("tensorfold.utils.distributed.Ranks.broadcast", broadcast)
    for rate in (2e-3, 10.0):  # steps that are kept, and steps that are taken back
        sent[rate] = []
        monkeypatch.setattr(refine, "_RATE", rate)
        _, report = fold(tiny, tokenizer, prose)
        assert all((after < before) == (rate < 1) for before, after in report.refined.values())
    assert sent[2e-3][-1]
    assert sent[2e-3] == sent[10.0]
