"""``--device`` of every command: what it computes is computed there, and a device that is not there is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

import fake_card
import tensorfold
from tensorfold.cli.needs import NEEDS
from tensorfold.utils import devices

CARD = ("--device", fake_card.NAME)
EVAL = ("--protocol", "disjoint-64", "--max-tokens", "256")
BENCH = ("--tokens", "1,3", "--prefill", "8", "--decode", "2", "--rounds", "2")
HEAL = ("--steps", "2", "--batch", "2", "--block", "32", "--blockwise-tokens", "128")
COMPRESS = ("--size", "0.9", "--tokens", "256", "--max-tokens", "64", "--minutes", "0.001")
COMPUTES_NOTHING = {"plan", "push", "recipes"}


@pytest.fixture
def arguments(dense_directory, folded_directory, text_file, tmp_path):
    """By command, what makes it compute as little as it can."""
    out = ("--out", tmp_path / "out")
    return {
        "eval": (folded_directory, "--text", text_file, *EVAL),
        "sample": (folded_directory, "--tokens", "4", "--temperature", "0"),
        "fold": (dense_directory, "--keep", "0.6", "--calibrate", text_file, "--tokens", "256", *out),
        "heal": (folded_directory, "--train", text_file, "--teacher", dense_directory, *HEAL, *out),
        "bench": (folded_directory, "--against", dense_directory, *BENCH),
        "export": (folded_directory, "--to", "dense", *out),
        "report": (folded_directory, dense_directory, "--tokens", "16", "--out", tmp_path / "page.html"),
        "compress": (dense_directory, "--text", text_file, *COMPRESS, *out),
        "demo": out,
    }


def mostly(work):
    """Whether products and decompositions were computed on the card, but for small ones of files and orders."""
    return work[fake_card.NAME] > 0 and work["cpu"] <= 0.05 * work[fake_card.NAME]


@pytest.mark.parametrize("name", ["eval", "sample", "bench", "report"])
def test_what_runs_models_runs_them_there(command, arguments, card, name):
    outcome = command(name, *arguments[name], *CARD)
    assert outcome.status == 0, outcome.err
    assert mostly(card)


def test_results_are_those_of_the_cpu(command, arguments, card):
    there, here = (json.loads(command("eval", *arguments["eval"], "--json", *more).out) for more in (CARD, ()))
    assert there["perplexity"] == pytest.approx(here["perplexity"], rel=1e-5)
    assert command("sample", *arguments["sample"], *CARD).out == command("sample", *arguments["sample"]).out


@pytest.mark.parametrize("to", ["dense", "int8"])
def test_export_writes_what_the_cpu_writes(command, folded_directory, tmp_path, card, to):
    for name, more in (("there", CARD), ("here", ())):
        done = command("export", folded_directory, "--to", to, "--out", tmp_path / name, *more)
        assert done.status == 0, done.err
    there, here = (load_file(tmp_path / name / "model.safetensors") for name in ("there", "here"))
    assert there.keys() == here.keys()
    assert all(torch.allclose(there[key].float(), here[key].float(), atol=1e-5) for key in here)


def test_dtype_of_export(command, refused, folded_directory, tmp_path):
    command("export", folded_directory, "--to", "dense", "--dtype", "bfloat16", "--out", tmp_path / "half")
    assert tensorfold.load(tmp_path / "half").dtype == torch.bfloat16
    refused("export", folded_directory, "--to", "onnx", "--dtype", "bfloat16", "--out", tmp_path / "graph",
            says=["--dtype has no effect here", "--to dense or int8"])  # fmt: skip


def test_heal_trains_there(command, arguments, card, tmp_path):
    outcome = command("heal", *arguments["heal"], *CARD)
    assert outcome.status == 0, outcome.err
    assert mostly(card)
    assert tensorfold.load(tmp_path / "out").device.type == "cpu"


@pytest.mark.slow
def test_compress_does_every_step_there(command, arguments, card, tmp_path):
    outcome = command("compress", *arguments["compress"], *CARD)
    assert outcome.status == 0, outcome.err
    assert mostly(card)
    assert json.loads((tmp_path / "out" / "compress.json").read_text())["order"]["device"] == fake_card.NAME


def test_every_command_that_computes_has_the_option():
    assert {name for name, needs in NEEDS.items() if "device" not in needs} == COMPUTES_NOTHING


@pytest.mark.parametrize("name", sorted(NEEDS.keys() - COMPUTES_NOTHING))
def test_an_absent_device_is_refused(refused, arguments, tmp_path, name):
    refused(name, *arguments[name], "--device", "xpu:7", says=["device 'xpu:7': not on this machine", "which has cpu"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["fold", "heal", "bench", "export", "compress", "demo"])
def test_what_takes_one_device_takes_no_auto(refused, arguments, name):
    refused(name, *arguments[name], "--device", "auto", says=["device 'auto'", "one device", "name it, such as cuda"])


def test_heal_takes_the_first_of_a_kind(refused, arguments, monkeypatch):
    monkeypatch.setattr(devices, "_there", lambda: ["cpu", "cuda:0", "cuda:1"])
    for name in ("heal", "compress"):
        refused(name, *arguments[name], "--device", "cuda:1", says=["the first cuda", "CUDA_VISIBLE_DEVICES=1"])


def test_graphs_are_written_by_the_cpu(refused, folded_directory, tmp_path, card):
    refused("export", folded_directory, "--to", "openvino", "--out", tmp_path / "out", *CARD,
            says=["--device has no effect here", "written by the CPU"])  # fmt: skip
