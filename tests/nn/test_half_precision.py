"""float16 ends at 65,504: what lies between two factors may pass that where the result does not, unseen."""

import copy

import pytest
import torch

import tensorfold
from market import MARKET
from tensorfold import Graded, InputError, Kronecker, LowRank, SpecError, TokenMPS
from tensorfold.algebra.contraction.search import fastest_path
from tensorfold.errors import TensorfoldError
from tensorfold.export import checkpoints as exporting
from tensorfold.export.checkpoints import export_dense, export_int8
from tensorfold.nn import GradedEmbedding, MPOEmbedding, MPOLinear, TokenMPSEmbedding
from tensorfold.nn.base import store
from tensorfold.nn.int8 import Int8Embedding, Int8Folded, Int8Linear, dequantize, quantize_rows

STRUCTURES = [name for name, spec in MARKET.items() if spec.sites > 1]
TABLES = {
    "low-rank": lambda: MPOEmbedding(LowRank(rank=8).spec(96, 32)),
    "kronecker": lambda: MPOEmbedding(Kronecker(factor=(12, 4), terms=4, scalars=True).spec(96, 32)),
    "ordered": lambda: MPOEmbedding(Kronecker(factor=(12, 4), terms=4, order="cluster").spec(96, 32)),
    "graded": lambda: GradedEmbedding(Graded(keep=0.4).spec(96, 32)),
    "token-mps": lambda: TokenMPSEmbedding(TokenMPS(rank=4, modes=(2, 2, 2, 2, 2)).spec(96, 32)),
}


def uneven(module, power):
    """The same matrix, to the bit, with 2^power more in one factor and less in another."""
    with torch.no_grad():
        module.cores[-1].mul_(2.0**power)
        for core in module.cores[:-1] if hasattr(module.spec, "classes") else module.cores[:1]:
            core.mul_(2.0**-power)
    return module.half()


def exact(module):
    return copy.deepcopy(module).double()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def assert_as_in_float64(module, x):
    """Where float64 finds numbers that float16 can hold, these are they."""
    got = module(x)
    expected = exact(module)(x.double() if x.is_floating_point() else x)
    assert got.dtype == torch.float16
    peak = float(expected.abs().max())
    assert peak < 60_000
    torch.testing.assert_close(got.double(), expected, rtol=4e-3, atol=4e-3 * peak)


@pytest.mark.parametrize("power", [-11, 11])
@pytest.mark.parametrize("name", STRUCTURES)
def test_what_lies_between_the_factors_of_a_layer_may_be_large(name, power):
    torch.manual_seed(0)
    spec = MARKET[name]
    layer = uneven(MPOLinear(spec), power)
    for tokens in (1, 100):
        assert_as_in_float64(layer, 1000 * normal(tokens, spec.in_features).half())
    for force in ("materialise", "chain", fastest_path(spec, 7)):
        layer.way = force if isinstance(force, str) else None
        assert_as_in_float64(layer, 1000 * normal(7, spec.in_features).half())
    assert bool(layer.to_dense().isfinite().all())


@pytest.mark.parametrize("power", [-11, 11])
@pytest.mark.parametrize("name", TABLES)
def test_what_lies_between_the_factors_of_a_table_may_be_large(name, power):
    torch.manual_seed(0)
    table = uneven(TABLES[name](), power)
    with torch.no_grad():
        assert_as_in_float64(table, torch.arange(96))
        assert_as_in_float64(table.head(), 1000 * normal(5, 32).half())
        eight = [Int8Folded(table)]
        eight.append(Int8Folded(table.head(), eight[0]))
        dense = eight[0].to_dense(torch.float64)
        torch.testing.assert_close(eight[0](torch.arange(96)).double(), dense, rtol=4e-3, atol=4e-3)
        x = 1000 * normal(5, 32).half()
        torch.testing.assert_close(eight[1](x).double(), x.double() @ dense.T, rtol=4e-3, atol=100)


@pytest.mark.parametrize("name", ["low-rank", "kronecker-scalars", "mpo-3"])
def test_autocast_to_float16(name):
    """The layer is in float32, its products are not."""
    torch.manual_seed(0)
    layer = uneven(MPOLinear(MARKET[name]), 11).float()
    x = 1000 * normal(7, layer.in_features)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        got = layer(x)
    assert got.dtype == torch.float16
    expected = exact(layer)(x.double()).detach()
    torch.testing.assert_close(got.double(), expected, rtol=4e-3, atol=4e-3 * float(expected.abs().max()))


def test_an_embedding_is_not_cast():
    """nn.Embedding gives the rows of its table under autocast, too."""
    for make in TABLES.values():
        table, index = make(), torch.arange(96)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            rows, dense = table(index), table.to_dense()
        torch.testing.assert_close(rows, table.to_dense())
        torch.testing.assert_close(dense, table.to_dense())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_codes_are_not_summed_unscaled(dtype):
    weight, x = (1e-3 * normal(24, 64)).to(dtype), (3000 * normal(9, 64, seed=1)).to(dtype)
    layers = [
        Int8Linear.from_dense(weight),
        Int8Embedding.from_dense(weight).head(),
        Int8Folded(MPOLinear.from_dense(weight, LowRank(rank=24).spec(24, 64))),
    ]
    for layer in layers:
        expected = x.double() @ layer.to_dense(torch.float64).T
        tolerance = 64 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            layer(x).double(), expected, rtol=tolerance, atol=tolerance * float(expected.detach().abs().max())
        )


@pytest.mark.parametrize("peak", [6e4, 1.0, 1e-3, 1e-4, 1e-5, 3e-6, 3e-7])
def test_small_weights_in_float16_are_off_by_half_a_scale_at_most(peak):
    """float16 has few numbers below 1e-4: a scale rounded down would cut off the largest weights, or all of them."""
    weight = (normal(6, 50).clamp(-3, 3) / 3 * peak).half()
    codes, scale = quantize_rows(weight)
    off = (dequantize(codes, scale, torch.float64) - weight.double()).abs()
    assert (off <= scale.double() / 2 * 1.13 + 1e-30).all()
    assert (scale.double() <= 1.001 * weight.double().abs().amax(1, keepdim=True) / 127 + 2.0**-24).all()


def test_numbers_too_large_for_the_dtype_are_refused():
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))
    with torch.no_grad(), pytest.raises(SpecError, match=r"up to 1\.0e\+05, and torch.float16 ends at 65504"):
        store(parameter, torch.tensor([1.0, 1e5]))


@pytest.mark.parametrize("to", ["dense", "onnx", "int8"])
def test_an_export_of_a_model_with_infinite_logits_fails(command, edited, tmp_path, to):
    if to == "onnx":
        pytest.importorskip("onnxruntime")

    def enlarge(tensors):
        for name in tensors:
            tensors[name] *= 1e25 if "mlp" in name else 1

    out = tmp_path / "out"
    outcome = command("export", edited("dense", tensors=enlarge), "--to", to, "--out", out)
    assert outcome.status == 1
    assert f"export --to {to}" in outcome.err
    assert "the model's own are NaN or infinite in float32" in outcome.err
    assert not out.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("write", [export_dense, export_int8])
def test_an_export_whose_logits_are_not_finite_fails(tiny, tmp_path, monkeypatch, write, dtype):
    load = exporting.load

    def damaged(path):
        model = load(path)
        model.model.norm.weight.data[3] = float("inf")
        return model

    monkeypatch.setattr(exporting, "load", damaged)
    model = tiny("llama").to(dtype)
    with pytest.raises(TensorfoldError, match="those of what was written are NaN or infinite"):
        write(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_int8_of_weights_that_are_not_finite_is_refused(tiny):
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj holds NaN"):
        tensorfold.quantize(model)
    assert model.state_dict().keys() == before.keys()
