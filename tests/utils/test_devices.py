"""Devices by name: those that are there, those that are not, and those that cannot fold."""

import pytest
import torch

from tensorfold import InputError
from tensorfold.hf.sources import find_model
from tensorfold.utils import devices
from tensorfold.utils.devices import check_device, check_solves


@pytest.fixture
def cards(monkeypatch):
    """Two cards that this machine does not have."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))


def test_devices_that_are_there(cards):
    assert [check_device(name) for name in (None, "auto", "cpu", "cuda", "cuda:1")] == [
        None, "auto", "cpu", "cuda", "cuda:1",
    ]  # fmt: skip
    assert check_solves("cuda:1") == "cuda:1"


@pytest.mark.parametrize("name", ["cuda:2", "xpu", "gpu", ""])
def test_devices_that_are_not(cards, name):
    with pytest.raises(InputError, match=r"not on this machine, which has cpu, cuda:0, cuda:1"):
        check_device(name)


def test_what_cannot_fold(monkeypatch):
    with pytest.raises(InputError, match="one device"):
        check_solves("auto")
    monkeypatch.setattr(devices, "_there", lambda: ["cpu", "mps:0"])
    with pytest.raises(InputError, match="no float64"):
        check_solves("mps")


def test_a_model_is_put_there(dense_directory):
    source = find_model(str(dense_directory))
    assert source.model(device="cpu").device == torch.device("cpu")
    divided = source.model(device="auto")
    ids = torch.arange(5)[None]
    with torch.no_grad():
        assert torch.equal(divided(ids).logits, source.model()(ids).logits)


def test_the_command_line(command, refused, dense_directory, text_file, tmp_path):
    for name in ("fold", "sample", "eval"):
        options = {"fold": ("--keep", "0.5", "--out", tmp_path / "out"), "eval": ("--text", text_file)}.get(name, ())
        refused(name, dense_directory, *options, "--device", "xpu:7", says=["device 'xpu:7'", "which has cpu"])
    plain = ("sample", dense_directory, "--tokens", "4", "--temperature", "0")
    assert command(*plain, "--device", "cpu").out == command(*plain).out
