"""Pages of replaced weights are given back, and nothing is destroyed by it."""

import builtins
import mmap
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tensorfold
from tensorfold.benchmark.memory import peak_of_call
from tensorfold.benchmark.report import processor
from tensorfold.utils import memory
from tensorfold.utils.memory import release_file_pages, release_heap


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


def test_pages_are_the_systems():
    assert memory._PAGE == mmap.PAGESIZE


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_without_proc_nothing_fails(monkeypatch, tmp_path, platform):
    """As on macOS, or where a container hides it."""
    real = builtins.open

    def without_proc(file, *args, **kwargs):
        if str(file).startswith("/proc"):
            raise FileNotFoundError(2, "No such file or directory", file)
        return real(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", without_proc)
    monkeypatch.setattr(sys, "platform", platform)
    save_file({"weight": torch.ones(5000)}, tmp_path / "model.safetensors")
    mapped = load_file(tmp_path / "model.safetensors")["weight"]
    release_file_pages(mapped)
    release_heap()
    assert torch.equal(mapped, torch.ones(5000))
    assert processor()
    assert tensorfold.benchmark.memory._resident("VmRSS") > 0
    assert peak_of_call(lambda: torch.ones(5000), torch.device("cpu")) >= 20_000


def test_no_branch_is_for_a_system_that_is_not_supported():
    for path in Path(tensorfold.__file__).parent.rglob("*.py"):
        assert not re.search(r"os\.name|win32|\bWSL\b|for Windows|# Windows", path.read_text(encoding="utf-8")), path
