"""Devices by name: those that are there, and those that are not."""

import pytest
import torch

from tensorfold import InputError
from tensorfold.hf.sources import find_model
from tensorfold.utils.devices import check_device, one_device


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
    assert one_device("cuda:1", "one is needed") == "cuda:1"
    with pytest.raises(InputError, match="one is needed; name it"):
        one_device("auto", "one is needed")


@pytest.mark.parametrize("name", ["cuda:2", "xpu", "gpu", ""])
def test_devices_that_are_not(cards, name):
    with pytest.raises(InputError, match=r"not on this machine, which has cpu, cuda:0, cuda:1"):
        check_device(name)


def test_a_model_is_put_there(dense_directory):
    source = find_model(str(dense_directory))
    assert source.model(device="cpu").device == torch.device("cpu")
    divided = source.model(device="auto")
    ids = torch.arange(5)[None]
    with torch.no_grad():
        assert torch.equal(divided(ids).logits, source.model()(ids).logits)
