"""Pages of replaced weights are given back, and nothing is destroyed by it."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tensorfold.memory import release_file_pages


def resident_file_kilobytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssFile"))


@pytest.mark.skipif(sys.platform != "linux", reason="the hint exists on Linux only")
def test_mapped_pages_are_released_and_read_again(tmp_path):
    expected = torch.arange(4_000_000, dtype=torch.float32)
    save_file({"weight": expected, "other": torch.ones(3)}, tmp_path / "model.safetensors")
    mapped = load_file(tmp_path / "model.safetensors")["weight"]
    mapped.sum()
    before = resident_file_kilobytes()
    release_file_pages(mapped)
    assert resident_file_kilobytes() < before - 10_000
    assert torch.equal(mapped, expected)


def test_ordinary_memory_is_left_alone():
    tensor = torch.arange(100_000)
    release_file_pages(tensor)
    release_file_pages(tensor[:3])
    release_file_pages(torch.empty(5, device="meta"))
    assert torch.equal(tensor, torch.arange(100_000))
