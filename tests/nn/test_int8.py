"""Int8: no weight off by more than half its scale, saved and loaded bit by bit, for every kind of module."""

import json

import pytest
import torch
from torch import nn

import tensorfold
from tensorfold import Graded, InputError, Kronecker, LowRank, Recipe, Rule, TokenMPS
from tensorfold.models.sizes import stored_bytes
from tensorfold.nn import GradedEmbedding, MPOEmbedding, MPOLinear, TokenMPSEmbedding
from tensorfold.nn.int8 import Int8Embedding, Int8Folded, Int8Linear, dequantize, int8_linear, quantize_rows

IDS = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(0))
TABLES = {"low-rank": LowRank(keep=0.5), "graded": Graded(keep=0.5), "token-mps": TokenMPS(rank=4),
          "kronecker": Kronecker(factor=(30, 8), terms=9, order="cluster"), "dense": None}  # fmt: skip


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lead", [1, 2])
def test_no_weight_is_off_by_more_than_half_its_scale(lead, dtype):
    weight = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[2] = 0
    codes, scale = quantize_rows(weight, lead)
    assert codes.dtype == torch.int8
    assert scale.dtype == dtype
    assert tuple(scale.shape) == (6, 5, 8)[:lead] + (1,) * (3 - lead)
    off = (dequantize(codes, scale, torch.float64) - weight.double()).abs()
    slack = 1 + 2 * torch.finfo(dtype).eps * 127  # the scale itself is rounded to the dtype
    assert (off <= scale.double() / 2 * slack).all()
    assert (dequantize(codes, scale)[2] == 0).all()


@pytest.mark.parametrize("tokens", [1, 100])
def test_products_are_those_of_the_weights(tokens):
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*shape, generator=generator) for shape in [(40, 64), (40,), (tokens, 64)])
    layer = Int8Linear.from_dense(weight, bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ layer.to_dense().T + bias, rtol=1e-4, atol=1e-4)
    grown = x.clone().requires_grad_()
    layer(grown).sum().backward()
    torch.testing.assert_close(grown.grad, layer.to_dense().sum(0).expand_as(x), rtol=1e-4, atol=1e-4)
    empty = int8_linear(torch.zeros(0, 64), layer.codes, layer.scale)
    assert empty.shape == (0, 40)


def test_every_folded_module_computes_with_its_codes():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 32, generator=generator)
    tables = [
        GradedEmbedding.from_dense(weight, Graded(keep=0.5).spec(96, 32), scale=2.0),
        MPOEmbedding.from_dense(weight, Kronecker(keep=0.5).spec(96, 32), scale=2.0),
        TokenMPSEmbedding.from_dense(weight, TokenMPS(rank=4).spec(96, 32), scale=2.0),
    ]
    layers = [
        MPOLinear.from_dense(weight, method.spec(96, 32), torch.randn(96, generator=generator))
        for method in (LowRank(rank=9), Kronecker(factor=(12, 16), terms=3, scalars=True, permute="all"))
    ]
    index, x = torch.tensor([[3, 95], [0, 3]]), torch.randn(2, 3, 32, generator=generator)
    with torch.no_grad():
        for table in tables:
            eight, head = Int8Folded(table), table.head()
            torch.testing.assert_close(eight(index), 2 * eight.to_dense()[index], rtol=1e-5, atol=1e-5)
            close = Int8Folded(head, eight)
            assert {id(p) for p in close.codes.values()} == {id(p) for p in eight.codes.values()} != set()
            torch.testing.assert_close(close(x), x @ eight.to_dense().T, rtol=1e-4, atol=1e-4)
            assert (eight.to_dense() - table.to_dense()).abs().max() < 0.1
        for layer in layers:
            eight = Int8Folded(layer)
            torch.testing.assert_close(eight(x), x @ eight.to_dense().T + layer.bias, rtol=1e-4, atol=1e-4)
            assert "MPOLinear" in repr(eight)


@pytest.mark.parametrize(
    ("architecture", "tied", "table", "dtype"),
    [
        ("gpt2", True, "dense", torch.float32),
        ("gpt2", True, "graded", torch.float32),
        ("llama", True, "low-rank", torch.float32),
        ("llama", True, "token-mps", torch.bfloat16),
        ("llama", False, "dense", torch.float32),
        ("gemma3", True, "kronecker", torch.float32),
        ("phi", True, "dense", torch.float32),
    ],
)
def test_logits_survive_saving_bit_by_bit(tiny, tmp_path, architecture, tied, table, dtype):
    model = tiny(architecture, tied=tied)
    for parameter in model.parameters():  # ``model.to`` would round the rotary buffers as well, as loading does not
        parameter.data = parameter.data.to(dtype)
    rules = [Rule("mlp", LowRank(keep=0.6))] if table != "dense" else []
    if TABLES[table] is not None:
        rules.append(Rule("embedding", TABLES[table]))
    if rules:
        tensorfold.fold(model, Recipe(tuple(rules)))
    before = logits(model)
    report = tensorfold.quantize(model)
    assert report.bytes_after == stored_bytes(model) < 0.75 * report.bytes_before
    after = logits(model)
    # Each weight is off by 1/254 of its row's largest at most; errors add up as random numbers do.
    assert (after - before).abs().max() < 0.15 * before.abs().max()
    assert not torch.equal(after, before)
    assert not any(
        isinstance(module, nn.Linear | nn.Embedding) and module.weight.numel() > 9999 for module in model.modules()
    )
    model.save_pretrained(tmp_path)
    loaded = tensorfold.load(tmp_path)
    assert torch.equal(logits(loaded), after)
    assert loaded.dtype == dtype
    assert stored_bytes(loaded) == report.bytes_after
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert 0 <= size - report.bytes_after < 20_000  # headers
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format"] == 2
    assert len(config["int8"]) == report.modules
    if tied:
        mine = {id(parameter) for parameter in loaded.get_input_embeddings().parameters()}
        assert mine & {id(parameter) for parameter in loaded.get_output_embeddings().parameters()}
    out = loaded.generate(IDS[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=1)
    assert out.shape == (2, 9)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_what_cannot_be_quantised_or_done_with_what_is(tiny):
    model = tiny("llama")
    with pytest.raises(InputError, match="bits=4; needed 8"):
        tensorfold.quantize(model, bits=4)
    with pytest.raises(InputError, match="needed a transformers model"):
        tensorfold.quantize(nn.Linear(3, 3))
    tensorfold.quantize(model)
    assert isinstance(model.model.embed_tokens, Int8Embedding)
    with pytest.raises(InputError, match="quantised already"):
        tensorfold.quantize(model)
    with pytest.raises(InputError, match="quantised"):
        tensorfold.fold(model, LowRank(keep=0.5))


def test_export_writes_it(command, folded_directory, tmp_path, refused):
    outcome = command("export", folded_directory, "--to", "int8", "--out", tmp_path / "eight", "--json")
    assert outcome.status == 0, outcome.err
    result = json.loads(outcome.out)
    assert result["bytes"] < 0.5 * (folded_directory / "model.safetensors").stat().st_size
    assert 0 < result["difference"] < 0.1
    assert tensorfold.load(tmp_path / "eight").get_input_embeddings().spec.parameters > 0
    assert (tmp_path / "eight" / "tokenizer.json").exists()
    assert "eight bits" in (tmp_path / "eight" / "README.md").read_text()
    refused("export", tmp_path / "eight", "--to", "dense", "--out", tmp_path / "dense", says=["int8", "floating-point"])
    refused("export", tmp_path / "eight", "--to", "int8", "--out", tmp_path / "x", says=["quantised already"])


def test_a_missing_scale_is_refused(edited, tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny("llama")
    tensorfold.quantize(model)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.scale"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"up_proj\.scale"):
        tensorfold.load(tmp_path)


def test_pivoted_low_rank(tiny, tmp_path):
    """Its identity is not stored, so its cores are codes of what is."""
    model = tiny("llama")
    tensorfold.fold(model, Recipe(fold=(Rule("mlp", LowRank(keep=0.6, pivots=True)),)))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(ids).logits
        tensorfold.quantize(model)
        got = model(ids).logits
        assert (got - expected).abs().max() < 0.15 * expected.abs().max()
        model.save_pretrained(tmp_path)
        assert torch.equal(tensorfold.load(tmp_path)(ids).logits, got)
