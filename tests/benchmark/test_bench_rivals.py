"""``bench`` beside other libraries: only where they are installed, apply, and give what the layer gives."""

import os
import sys
import types

import pytest
import torch
from torch import Tensor

from bench_tools import QUICK, Clock, fold
from market import MARKET
from tensorfold import Spec
from tensorfold.benchmark import rivals
from tensorfold.benchmark.run import bench
from tensorfold.nn import MPOLinear


@pytest.fixture
def folded(tiny):
    return fold(tiny("llama"))


def double(name, build):
    return rivals.Rival(name, "json", build)


def test_missing_libraries_are_said_to_be_missing(monkeypatch, folded):
    absent = rivals.Rival("no-such-kernels", "no_such_kernels", lambda _: "")
    monkeypatch.setattr(rivals, "RIVALS", (absent,))
    assert rivals.installed() == ([], ["no-such-kernels is not installed: left out"])
    report = bench(folded, clock=Clock(), **QUICK)
    assert "note: no-such-kernels is not installed: left out" in str(report)


def test_installed_libraries_take_part(monkeypatch, folded):
    def build(layer: MPOLinear):
        return layer.forward if layer.spec.ranks == (1,) else "takes one term"

    monkeypatch.setattr(rivals, "RIVALS", (double("kernels", build),))
    report = bench(folded, clock=Clock(), **QUICK)
    with_it = {layer.names[0] for layer in report.layers if "kernels" in layer.points[0].timing.speedup}
    assert with_it == {"model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"}
    assert sum("kernels takes one term: left out for" in note for note in report.notes) == 2
    assert "× kernels" in str(report)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: torch.zeros(3, 6), "other outputs"),
        (lambda x: torch.full((3, 6), torch.nan), "other outputs"),
        (lambda x: torch.zeros(3, 5), "shape (3, 5), needed (3, 6)"),
        (lambda x: x / [], "fails (TypeError"),
    ],
)
def test_a_library_that_computes_something_else_is_left_out(call, says):
    layer = MPOLinear(Spec.kronecker(6, 4, (3, 2)))
    found = rivals.competitor(double("wrong", lambda _: call), layer, torch.randn(3, 4))
    assert isinstance(found, str)
    assert says in found


@pytest.mark.parametrize("rival", rivals.RIVALS, ids=lambda rival: rival.name)
def test_installed_libraries_give_the_layers_outputs(rival):
    if rival.missing:
        pytest.skip(f"{rival.name} is not installed")
    for spec in MARKET.values():
        layer = MPOLinear(spec)
        applies = not (spec.is_padded or spec.reordered) and (rival.name != "pyfastkron" or set(spec.ranks) == {1})
        found = rivals.competitor(rival, layer, torch.randn(3, layer.in_features))
        assert isinstance(found, str) != applies, (spec, found)


def test_pyfastkron_is_asked_for_single_products_only(monkeypatch):
    """Its calling convention, by a stand-in that follows its documentation: ``x (F1 ⊗ F2)``."""

    def gemkm(x: Tensor, factors: list[Tensor]) -> Tensor:
        assert all(factor.is_contiguous() for factor in factors)
        return x @ torch.kron(*factors)

    stand_in = types.SimpleNamespace(
        gemkm=gemkm, fastkrontorch=types.SimpleNamespace(isSupported=lambda x, _: x.dtype == torch.float32)
    )
    monkeypatch.setitem(sys.modules, "pyfastkron.fastkrontorch", stand_in)
    monkeypatch.setitem(sys.modules, "pyfastkron", types.ModuleType("pyfastkron"))
    rival = rivals.Rival("pyfastkron", "json", rivals._pyfastkron)
    for bias in (True, False):
        layer = MPOLinear(Spec.kronecker(12, 10, (4, 5), scalars=True), bias)
        assert callable(rivals.competitor(rival, layer, torch.randn(3, 10)))
    half = MPOLinear(Spec.kronecker(12, 10, (4, 5))).to(torch.bfloat16)
    x = torch.randn(3, 10)
    assert "no kernels for bfloat16" in rivals.competitor(rival, half, x.bfloat16())
    assert "single Kronecker" in rivals.competitor(rival, MPOLinear(Spec.kronecker(12, 10, (4, 5), 2)), x)
    assert "padded" in rivals.competitor(rival, MPOLinear(Spec((4, 3), (5, 2), (1,), 11)), x)
    assert "index orders" in rivals.competitor(rival, MPOLinear(Spec.kronecker(12, 10, (4, 5), reordered=("out",))), x)


def test_libraries_are_imported_with_torchs_threads(monkeypatch, tmp_path):
    (tmp_path / "asks_once.py").write_text("import os\nthreads = os.environ['OMP_NUM_THREADS']\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert rivals._import("asks_once").threads == str(torch.get_num_threads())
    assert os.environ["OMP_NUM_THREADS"] == "7"
    monkeypatch.delenv("OMP_NUM_THREADS")
    rivals._import("asks_once")
    assert "OMP_NUM_THREADS" not in os.environ
