"""A structure that the package does not know, from ``examples/``: fold, heal, save, load, export, int8."""

import pytest
import torch

import tensorfold
from market import own_structure
from tensorfold.algebra.solvers.solve import relative_error
from tensorfold.algebra.specs import structure
from tensorfold.export.checkpoints import export_dense
from tensorfold.hf.loading import save
from tensorfold.nn import StructuredLinear, StructuredTable

METHOD = own_structure.BlockDiagonalMethod(keep=0.5)
EVERYTHING = tensorfold.Recipe((tensorfold.Rule(["mlp", "attention", "embedding"], METHOD),))


@pytest.fixture
def folded(tiny):
    model = tiny("llama")
    report = tensorfold.fold(model, EVERYTHING)
    return model, report


def logits(model):
    with torch.no_grad():
        return model(torch.arange(20).reshape(2, 10)).logits


def test_it_finds_blocks_that_are_there():
    torch.manual_seed(0)
    spec = own_structure.BlockDiagonal(24, 32, 4)
    weight = spec.dense([torch.rand(spec.core_shapes[0], dtype=torch.float64) + 0.5])
    mixed = weight[torch.randperm(24)][:, torch.randperm(32)]
    two = own_structure.BlockDiagonal(24, 32, 2)
    halves = two.dense([torch.rand(two.core_shapes[0], dtype=torch.float64) + 0.5])
    halves = halves[torch.randperm(24)][:, torch.randperm(32)]
    for dense, of in ((mixed, spec), (halves, two)):
        module = StructuredLinear.from_factors(METHOD.solve(dense, of), of, dense)
        assert relative_error(dense, module.to_dense().detach()) < (1e-9 if of is two else 0.9)


def test_it_folds_at_the_size_asked_for(folded):
    model, report = folded
    assert {type(spec) for spec in report.modules.values()} == {own_structure.BlockDiagonal}
    assert {spec.parameters / spec.dense_parameters for spec in report.modules.values()} == {0.5}
    assert all(0 < error < 1 for error in report.errors.values())
    assert isinstance(model.get_input_embeddings(), StructuredTable)
    assert isinstance(model.get_output_embeddings(), StructuredLinear)
    assert "block-diagonal 48×32" in str(report)


def test_text_decides_its_metric(tiny, tokenizer, prose):
    linear = tensorfold.Recipe((tensorfold.Rule(["mlp"], METHOD),))
    model, plain = tiny("llama"), tiny("llama")
    report = tensorfold.fold(model, linear, tokenizer, [prose], calibration_tokens=512)
    assert set(report.metrics.values()) == {"activation"}
    tensorfold.fold(plain, linear)
    assert not torch.equal(logits(model), logits(plain))


def test_it_is_saved_and_loaded_bit_equal(folded, tokenizer, tmp_path):
    model, report = folded
    save(model, tokenizer, tmp_path / "out", {"base_model": "dense", **report.to_dict()})
    assert torch.equal(logits(tensorfold.load(tmp_path / "out")), logits(model))


def test_a_stranger_is_told_what_to_import(folded, tokenizer, tmp_path, monkeypatch):
    model, report = folded
    save(model, tokenizer, tmp_path / "out", {"base_model": "dense", **report.to_dict()})
    monkeypatch.delitem(structure.STRUCTURES, "block-diagonal")
    with pytest.raises(tensorfold.InputError, match="'block-diagonal' is not known; import the module"):
        tensorfold.load(tmp_path / "out")


def test_it_heals(folded, dense_directory, tokenizer, text_file):
    model, _ = folded
    before = [core.detach().clone() for core in model.get_input_embeddings().cores]
    report = tensorfold.heal(
        model, text_file, tokenizer=tokenizer, steps=4, block=32, batch=2, train="all", warmup=0,
    )  # fmt: skip
    assert report.steps == 4
    assert any(not torch.equal(a, b) for a, b in zip(before, model.get_input_embeddings().cores, strict=True))


def test_it_is_exported_as_the_dense_model_it_stands_for(folded, tokenizer, tmp_path):
    model, _ = folded
    export_dense(model, tmp_path / "dense", tokenizer)
    torch.testing.assert_close(logits(tensorfold.load(tmp_path / "dense")), logits(model))


def test_it_is_quantised(folded, tokenizer, tmp_path):
    model, report = folded
    wanted = logits(model)
    tensorfold.quantize(model)
    save(model, tokenizer, tmp_path / "int8", {"base_model": "dense", **report.to_dict()})
    assert torch.equal(logits(tensorfold.load(tmp_path / "int8")), logits(model))
    assert float((logits(model) - wanted).norm() / wanted.norm()) < 0.1


def test_one_without_a_kind_is_refused_before_anything_is_solved(tiny, monkeypatch):
    monkeypatch.setattr(own_structure.BlockDiagonal, "kind", "")
    monkeypatch.setattr("tensorfold.folding.in_memory.solve_matrix", None)
    with pytest.raises(tensorfold.InputError, match=r"BlockDiagonal has no kind.*give the class one"):
        tensorfold.fold(tiny("llama"), METHOD)
