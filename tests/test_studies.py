"""The studies run: a few steps of each kind, on the real text."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
STUDIES = Path(__file__).parents[1] / "studies"
DATA = os.environ.get("TENSORFOLD_DATA")


@pytest.mark.skipif(not DATA, reason="needs TENSORFOLD_DATA")
def test_the_picogpt_study(tmp_path):
    """Dense, folded and healed, from random cores, and the rivals; a second call finds nothing left to do."""
    command = [sys.executable, STUDIES / "picogpt/run.py", "--work", tmp_path, "--quick", "--jobs", "1"]
    subprocess.run(command, check=True, timeout=600)
    runs = {run["run"]: run for run in map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())}
    sizes = {name.removeprefix("tuned-"): run["parameters"] for name, run in runs.items()}
    assert sizes["dense-0-random-0"] == 808_448
    assert sizes["mpo-16-fold-0"] == sizes["mpo-16-random-0"] == 177_408
    assert all(0.9 * 177_408 < sizes[f"{rival}-177408-fold-0"] <= 177_408 for rival in ("low-rank", "kronecker"))
    for name, run in runs.items():
        assert run["after"]["loss"] < run["before"]["loss"], name
        log = [json.loads(line) for line in (tmp_path / "logs" / f"{name}.jsonl").read_text().splitlines()]
        assert [line["step"] for line in log] == [0, run["steps"]], name
    errors = runs["tuned-mpo-16-fold-0"]["errors_before"]
    assert len(errors) == 25
    assert all(0 < error < 1 for error in errors.values())
    before = (tmp_path / "runs.jsonl").read_bytes()
    subprocess.run(command, check=True, timeout=120)
    assert (tmp_path / "runs.jsonl").read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_fold_scale_study(tmp_path):
    """A tiny checkpoint is made, folded and removed; every fit is timed."""
    log = tmp_path / "log.jsonl"
    command = [sys.executable, STUDIES / "speed/fold_scale.py", "--work", tmp_path / "work", "--log", log, "--quick"]
    subprocess.run(command, check=True, timeout=600)
    fold, *fits = map(json.loads, log.read_text().splitlines())
    assert fold["matrices"] == 9
    assert fold["parameters_after"] < fold["parameters_before"]
    assert fold["peak_mb"] > 0
    assert [fit["width"] for fit in fits] == [64, 64, 128, 128]
    assert not list((tmp_path / "work").glob("*/*"))


def test_the_int8_study(dense_directory, text_file, tmp_path):
    """Four forms of a tiny model, each with its bytes, its speed and its perplexity."""
    log = tmp_path / "log.jsonl"
    command = [sys.executable, STUDIES / "speed/int8.py", "--model", dense_directory, "--text", text_file, "--log", log]
    subprocess.run([*command, "--quick"], check=True, timeout=600)
    forms = {entry["form"]: entry for entry in map(json.loads, log.read_text().splitlines())}
    assert list(forms) == ["dense fp32", "folded fp32", "dense int8", "folded int8"]
    sizes = [forms[name]["bytes"] for name in ("dense fp32", "folded fp32", "dense int8", "folded int8")]
    assert sizes == sorted(sizes, reverse=True)
    assert all(entry["perplexity"] > 1 and entry["decode_tokens_per_second"] > 0 for entry in forms.values())


@pytest.mark.parametrize("study", ["layers", "models", "van_loan"])
def test_the_speed_studies(tmp_path, study):
    """A round of each, with the machine's speeds kept out of the user's cache."""
    log = tmp_path / "log.jsonl"
    command = [sys.executable, STUDIES / f"speed/{study}.py", "--log", log, "--quick"]
    subprocess.run(command, check=True, timeout=600, env={**os.environ, "TENSORFOLD_CACHE": str(tmp_path / "cache")})
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    if study == "layers":
        assert {entry["kind"] for entry in entries} == {"MPOLinear"}
        assert all(len(entry[kind]) == 2 for entry in entries for kind in ("tokens", "held", "training"))
    elif study == "models":
        assert [entry["what"] for entry in entries] == [*["prefill"] * 4, *["decode"] * 4, "mlp of one token"]
    else:
        assert entries[0]["largest_excess_error"] < 1e-6


def test_the_export_study(tmp_path):
    """A pair of graphs of one block, written and timed."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    log = tmp_path / "log.jsonl"
    command = [sys.executable, STUDIES / "export/onnx_speed.py", "--work", tmp_path / "work", "--log", log, "--quick"]
    subprocess.run([*command, "--export", "--rounds", "1"], check=True, timeout=600)
    [entry] = map(json.loads, log.read_text().splitlines())
    assert entry["model"] == "krony-81m"
    assert entry["parameters"]["folded"] < entry["parameters"]["dense"]
    assert entry["seconds"].keys() == {"dense", "folded"}


def test_the_shapes_on_paper_are_those_of_the_models(monkeypatch):
    """Parameters of the large models that ``studies/scale/paper.py`` counts, by transformers, without their norms."""
    from transformers import LlamaConfig, Qwen3MoeConfig

    from tensorfold.models.anatomy import empty_model

    monkeypatch.syspath_prepend(STUDIES / "scale")
    import paper

    for shape in (*paper.SHAPES, *paper.MEASURED):
        sizes = {
            "hidden_size": shape.width, "num_hidden_layers": 2, "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads, "head_dim": shape.head, "intermediate_size": shape.hidden,
            "vocab_size": shape.vocabulary, "tie_word_embeddings": shape.tied,
        }  # fmt: skip
        experts = {
            "moe_intermediate_size": shape.hidden,
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.sent,
        }
        model = empty_model(Qwen3MoeConfig(**sizes, **experts) if shape.experts else LlamaConfig(**sizes))
        counted = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
        assert dataclasses.replace(shape, blocks=2).parameters == counted, shape.name


def test_more_of_everything_takes_longer_on_paper(monkeypatch):
    monkeypatch.syspath_prepend(STUDIES / "scale")
    import paper

    small, large, mixture = paper.SHAPES
    one, more = paper.work(small, tokens=1024), paper.work(small, tokens=2048)
    assert more.passes == 2 * one.passes
    assert more.decompositions == one.decompositions
    assert paper.work(small, targets="mlp").macs < paper.work(small).macs < paper.work(large).macs
    for shape in (small, large, mixture):
        alone, eight = (paper.on_ranks(paper.work(shape), paper.GPU, ranks) for ranks in (1, 8))
        assert alone / 8 < eight < alone
