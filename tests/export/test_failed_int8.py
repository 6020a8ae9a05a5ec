"""An export in int8 that fails leaves the model in floating point."""

import pytest
import torch

import tensorfold
from tensorfold import LowRank
from tensorfold.export import checkpoints
from tensorfold.export.checkpoints import export_int8


def test_a_failed_export_leaves_the_model_as_it_was(tiny, tmp_path, monkeypatch):
    model = tiny("llama")
    tensorfold.fold(model, LowRank(keep=0.5))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(12)[None]
    wanted = model(ids).logits

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints, "write_beside", full)
    with pytest.raises(Exception, match="disk is full"):
        export_int8(model, tmp_path / "out")
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    torch.testing.assert_close(model(ids).logits, wanted)
    model.save_pretrained(tmp_path / "folded")
    assert torch.equal(tensorfold.load(tmp_path / "folded")(ids).logits, wanted)
    monkeypatch.undo()
    export_int8(model, tmp_path / "out")
