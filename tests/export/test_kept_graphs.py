"""Exports of one model in several bits, made from one trace, hold what each export writes by itself."""

import pytest

import tensorfold
from tensorfold import LowRank, Recipe, Rule
from tensorfold.export import graphs
from tensorfold.export.graphs import export_onnx, export_openvino
from tensorfold.export.kept_graphs import KeptGraphs

EXPORTS = {"onnx": (export_onnx, "onnxscript"), "openvino": (export_openvino, "nncf")}


@pytest.fixture(params=EXPORTS)
def export(request):
    function, package = EXPORTS[request.param]
    pytest.importorskip(package)
    return function


@pytest.fixture
def traces(monkeypatch):
    """Engines for which the graphs that were traced."""
    seen = []
    trace = graphs.trace
    monkeypatch.setattr(graphs, "trace", lambda model, to: (seen.append(to), trace(model, to))[1])
    return seen


def weights(directory):
    """What is not numbered by the process (names in OpenVINO's graph) or timed (the README)."""
    files = [path for path in directory.iterdir() if path.suffix in (".onnx", ".bin")]
    assert files
    return {path.name: path.read_bytes() for path in files}


def test_one_trace_serves_all_bits_and_weights_are_the_same(export, traces, tiny, tmp_path):
    model = tiny("llama")
    with KeptGraphs(tmp_path / "kept") as kept:
        for bits in (8, 4):
            export(model, tmp_path / f"shared-{bits}", bits=bits, kept=kept)
    assert len(traces) == 1
    assert not (tmp_path / "kept").exists()
    for bits in (8, 4):
        export(model, tmp_path / f"alone-{bits}", bits=bits)
        shared, alone = (tmp_path / f"{how}-{bits}" for how in ("shared", "alone"))
        assert weights(shared) == weights(alone)
        assert {path.name for path in shared.iterdir()} == {path.name for path in alone.iterdir()}


def test_other_weights_and_factors_for_other_bits_are_traced_anew(export, traces, tiny, tmp_path):
    model = tiny("llama")
    with KeptGraphs(tmp_path / "kept") as kept:
        export(model, tmp_path / "a", bits=8, kept=kept)
        tensorfold.fold(model, Recipe((Rule("mlp", LowRank(rank=8)),)))
        export(model, tmp_path / "b", bits=8, kept=kept)
        assert len(traces) == 2
        export(model, tmp_path / "c", bits=4, kept=kept)  # rounded otherwise, and balanced
        assert len(traces) == 3
        export(model, tmp_path / "d", bits=8, kept=kept)
        assert len(traces) == 3


def test_weights_beside_an_onnx_file_can_be_read_again(tiny, tmp_path, monkeypatch):
    """As those of every model beyond 450 million parameters; onnx does not read a file with two names."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(graphs, "_ONE_FILE", 1000)
    model = tiny("llama", num_hidden_layers=1)
    with KeptGraphs(tmp_path / "kept") as kept:
        for bits in (8, 4):
            report = graphs.export_onnx(model, tmp_path / f"shared-{bits}", bits=bits, kept=kept)
            files = list((tmp_path / f"shared-{bits}").glob("model.onnx*"))
            assert {path.name for path in files} == {"model.onnx", "model.onnx.data"}
            assert report.bytes == sum(path.stat().st_size for path in files)


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / "kept" / "half").mkdir(parents=True)
    with KeptGraphs(tmp_path / "kept"):
        assert not (tmp_path / "kept").exists()
