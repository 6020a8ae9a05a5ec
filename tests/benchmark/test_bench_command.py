"""``tensorfold bench``: what it prints where, what it draws, and what it refuses."""

import functools
import importlib.util
import json
import subprocess
import sys

import pytest
import torch

import tensorfold
from bench_tools import Clock
from tensorfold import LowRank, Recipe, Rule
from tensorfold.benchmark import memory, rivals, run
from tensorfold.benchmark.whole import size

OPTIONS = ("--tokens", "1,3", "--prefill", "8", "--decode", "2", "--rounds", "2")


@pytest.fixture
def steady(monkeypatch):
    """The command with a clock of its own, so that its output does not depend on the machine."""
    monkeypatch.setattr(rivals, "RIVALS", ())
    monkeypatch.setattr(run, "bench", functools.partial(run.bench, clock=Clock()))


def test_json_has_standard_output_to_itself(command, folded_directory, dense_directory, steady):
    outcome = command("bench", folded_directory, "--against", dense_directory, *OPTIONS, "--no-memory", "--json")
    assert outcome.status == 0, outcome.err
    assert outcome.out.count("\n") == 1
    result = json.loads(outcome.out)
    assert (result["model"], result["against"]) == ("folded", "dense")
    assert result["prefill"]["tokens"] == 8
    assert result["way"] is None


def test_as_a_process_json_is_all_there_is_with_peaks_of_processes(tiny, tmp_path):
    model = tiny("llama", hidden_size=256, intermediate_size=4096, num_hidden_layers=1)
    tensorfold.fold(model, Recipe((Rule("mlp", LowRank(rank=2)),)))
    model.save_pretrained(tmp_path / "folded")
    arguments = ["bench", str(tmp_path / "folded"), *OPTIONS, "--threads", "1", "--dtype", "float32", "--json"]
    launch = [sys.executable, "-m", "tensorfold.cli.main", *arguments]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    result = json.loads(done.stdout)
    assert (result["threads"], result["dtype"]) == (1, "float32")
    peaks, matrix = result["peak_bytes"], 4 * 256 * 4096
    assert set(peaks) == set(memory.FORMS)
    assert peaks["model"] > size(model)
    if sys.platform == "linux":  # elsewhere the peak includes loading
        assert peaks["dense"] > peaks["model"] + 2 * matrix  # of the three that are multiplied out
        assert peaks["materialised"] > peaks["model"] + matrix // 2


def test_people_get_tables(command, folded_directory, steady):
    outcome = command("bench", folded_directory, *OPTIONS, "--no-memory", "--way", "chain")
    assert outcome.status == 0, outcome.err
    for words in ("× dense", "× materialised", "tokens/s", "multiply–adds", "peak MB", torch.__version__, "1→0"):
        assert words in outcome.out
    assert "model.layers.*.mlp.gate_proj, model.layers.*.mlp.up_proj" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 160


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_plot_is_drawn(command, folded_directory, steady, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"speed{suffix}"
    outcome = command("bench", folded_directory, *OPTIONS, "--no-memory", "--plot", path, "--json")
    assert outcome.status == 0, outcome.err
    json.loads(outcome.out)
    assert path.read_bytes()[:5] in (b"<?xml", b"\x89PNG\r")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_plot_that_cannot_be_is_refused_before_anything_is_timed(
    refused, folded_directory, dense_directory, tmp_path, monkeypatch
):
    monkeypatch.setattr("tensorfold.benchmark.run.bench", None)
    plot = ("bench", folded_directory, "--plot")
    refused(*plot, tmp_path / "speed.txt", says=["speed.txt", ".svg"])
    refused(*plot, tmp_path / "absent" / "speed.svg", says=["speed.svg", "cannot be written"])
    refused("bench", dense_directory, "--plot", tmp_path / "speed.svg", says=["no folded layers", "leave --plot out"])
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else real(name, *a))
    refused(*plot, tmp_path / "speed.svg", says=["matplotlib", "pip install matplotlib"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], ["MODEL"]),
        (["FOLDED", "--way", "fastest"], ["--way", "chain", "materialise"]),
        (["FOLDED", "--tokens", "1,x"], ["--tokens '1,x'", "1,16,128"]),
        (["FOLDED", "--tokens", "0"], ["--tokens '0'", "at least 1"]),
        (["FOLDED", "--tokens", "2,2"], ["tokens=(2, 2)", "all differ"]),
        (["FOLDED", "--rounds", "0"], ["--rounds"]),
        (["FOLDED", "--dtype", "int8"], ["--dtype", "bfloat16"]),
        (["FOLDED", "--prefill", "127"], ["127 tokens", "128 positions", "at most 96"]),
        (["nowhere"], ["nowhere", "no such directory"]),
        (["FOLDED", "--against", "nowhere"], ["nowhere", "no such directory"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(refused, folded_directory, arguments, says):
    refused("bench", *(folded_directory if a == "FOLDED" else a for a in arguments), says=says)
