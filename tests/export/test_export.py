"""Exports: a plain transformers directory and an ONNX graph that compute what the folded model does."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

import tensorfold
from tensorfold import MPO, Kronecker, LowRank, Recipe, Rule
from tensorfold.errors import InputError, TensorfoldError
from tensorfold.export import checkpoints as exporting
from tensorfold.export.checkpoints import export_dense, export_onnx
from tensorfold.export.tracing import PACKAGES
from tensorfold.hf.dense import plain_model
from tensorfold.models.anatomy import count_parameters
from tensorfold.nn import FoldedModule, MPOEmbedding, StackedLinear

MLP = {
    "low-rank": LowRank(keep=0.5),
    "kronecker": Kronecker(keep=0.5),
    "scalars": Kronecker(keep=0.5, scalars=True),
    "reordered": Kronecker(keep=0.5, scalars=True, permute="all"),
    "padded": MPO(bond=5, out_modes=(5, 3, 11), in_modes=(3, 5, 11)),
    "mpo": MPO(keep=0.5, sites=3),
}
EMBEDDING = {
    "low-rank": LowRank(keep=0.5),
    "scalars": Kronecker(factor=(300, 16), scalars=True),
    "mpo": MPO(keep=0.5, out_modes=(7, 7, 7), in_modes=(2, 4, 4)),
}


@pytest.fixture(scope="module")
def make(tiny):
    """``make(architecture, tied=…, mlp=…, embedding=…)``: folded, with weights and scalars whose effect is seen."""

    def folded(architecture, *, tied=True, mlp=None, embedding=None, head=None, split=False, **settings):
        model = tiny(architecture, tied=tied, **settings)
        for parameter in set(model.parameters()):
            if parameter.dim() == 2:
                parameter.data.mul_(6)
            elif architecture == "gpt2":
                parameter.data.add_(0.1 * torch.randn(parameter.shape))
        rules = [Rule({"regex": "c_attn"}, MPO(keep=0.5), split=3)] if split else []
        for targets, method in ((["mlp"], mlp), (["embedding"], embedding), (["lm_head"], head)):
            rules += [Rule(targets, method)] if method else []
        tensorfold.fold(model, Recipe(tuple(rules)))
        for module in model.modules():
            if isinstance(module, FoldedModule) and module.scalars is not None:
                module.scalars.data.copy_(torch.linspace(0.5, 2.0, len(module.scalars)))
        return model

    return folded


@torch.no_grad()
def logits(model, ids, mask=None):
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def tokens(batch, length):
    return torch.randint(300, (batch, length), generator=torch.Generator().manual_seed(length))


def floats_in(file):
    """How many numbers the initialisers of an ONNX file hold, without integers."""
    return sum(math.prod(tensor.dims) for tensor in file.graph.initializer if tensor.data_type == 1)


def assert_same_logits(model, path):
    """To 1e-4 in float32, where logits are of the order of one."""
    ids = tokens(2, 24)
    expected = logits(model, ids)
    assert expected.std() > 0.1
    plain = AutoModelForCausalLM.from_pretrained(path)
    assert type(plain) is type(model)
    torch.testing.assert_close(logits(plain, ids), expected, rtol=0, atol=1e-4)
    assert not any(isinstance(module, FoldedModule | StackedLinear) for module in plain.modules())
    return plain


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("structure", MLP)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_dense_export_gives_the_same_logits(make, tmp_path, architecture, structure, tied):
    head = None if tied else MPO(keep=0.5)
    embedding = EMBEDDING.get(structure)
    model = make(
        architecture, tied=tied, mlp=MLP[structure], embedding=embedding, head=head, split=architecture == "gpt2"
    )
    before = count_parameters(model)
    report = export_dense(model, tmp_path / "out")
    plain = assert_same_logits(model, tmp_path / "out")
    assert count_parameters(model) == before < report.parameters == count_parameters(plain)
    assert report.difference < 1e-4
    assert (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight) == tied


def test_every_module_is_the_architectures_own_again(make, tiny, tmp_path):
    model = make("gpt2", mlp=MLP["reordered"], embedding=EMBEDDING["scalars"], split=True)
    assert isinstance(model.transformer.h[0].attn.c_attn, StackedLinear)
    export_dense(model, tmp_path / "out")
    plain, original = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tiny("gpt2")
    assert {n: type(m) for n, m in plain.named_modules()} == {n: type(m) for n, m in original.named_modules()}
    assert type(plain.transformer.h[0].attn.c_attn) is Conv1D
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        name: tensor.shape for name, tensor in original.state_dict().items() if name != "lm_head.weight"
    }
    fused = torch.cat([part.to_dense() for part in model.transformer.h[1].attn.c_attn])
    torch.testing.assert_close(stored["transformer.h.1.attn.c_attn.weight"], fused.T)
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"] is True


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_scaled_embedding_is_scaled_once(make, tmp_path, tied):
    model = make("gemma3", tied=tied, mlp=MLP["scalars"], embedding=EMBEDDING["mpo"])
    assert model.get_input_embeddings().scale == pytest.approx(32**0.5)
    export_dense(model, tmp_path / "out")
    plain = assert_same_logits(model, tmp_path / "out")
    assert type(plain.get_input_embeddings()).__name__ == "Gemma3TextScaledWordEmbedding"


def test_the_plain_model_works_in_memory(make):
    model = make("gemma3", mlp=MLP["scalars"], embedding=EMBEDDING["mpo"]).train()
    plain = plain_model(model)
    assert not any(tensor.is_meta for tensor in (*plain.parameters(), *plain.buffers()))
    assert plain.training
    assert isinstance(model.get_input_embeddings(), MPOEmbedding)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    torch.testing.assert_close(logits(plain.eval(), tokens(2, 9)), logits(model.eval(), tokens(2, 9)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_stay_what_they_are(make, tmp_path, dtype):
    model = make("llama", mlp=MLP["kronecker"], embedding=EMBEDDING["low-rank"])
    export_dense(model.to(dtype), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    exact = model.model.layers[0].mlp.up_proj.to_dense(torch.float64)
    torch.testing.assert_close(stored["model.layers.0.mlp.up_proj.weight"], exact.to(dtype))


def test_the_directory_needs_nothing_of_ours(command, folded_directory, tmp_path):
    outcome = command("export", folded_directory, "--to", "dense", "--out", tmp_path / "out", "--json")
    assert outcome.status == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["to"] == "dense"
    assert report["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size == 300
    torch.save(tokens(2, 12), tmp_path / "ids.pt")
    code = (
        "import sys, torch\n"
        "sys.modules['tensorfold'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
        f"with torch.no_grad(): logits = model(torch.load({str(tmp_path / 'ids.pt')!r})).logits\n"
        f"torch.save(logits, {str(tmp_path / 'logits.pt')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = logits(tensorfold.load(folded_directory), tokens(2, 12))
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=1e-4)


def test_a_model_without_a_tokenizer_is_exported_without_one(command, dense_directory, tmp_path):
    tensorfold.load(dense_directory).save_pretrained(tmp_path / "bare")
    outcome = command("export", tmp_path / "bare", "--to", "dense", "--out", tmp_path / "out")
    assert outcome.status == 0
    assert "written without a tokenizer" in outcome.err
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert "written to" in outcome.out


def test_what_differs_is_not_kept(make, tmp_path, monkeypatch):
    model = make("llama", mlp=MLP["scalars"])

    def damaged(model):
        plain = plain_model(model)
        plain.model.layers[0].mlp.up_proj.weight.data.mul_(1.01)
        return plain

    monkeypatch.setattr(exporting, "plain_model", damaged)
    with pytest.raises(TensorfoldError, match="differ from the model's"):
        export_dense(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_weights_of_another_shape_are_refused(make, tmp_path):
    model = make("llama", mlp=MLP["kronecker"])
    model.model.norm.weight = nn.Parameter(torch.ones(31))
    with pytest.raises(TensorfoldError, match=r"model\.norm\.weight"):
        plain_model(model)


def test_bad_arguments_are_refused(refused, dense_directory, tmp_path):
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "file").touch()
    refused("export", dense_directory, "--to", "abacus", "--out", tmp_path / "out", says=["abacus", "dense", "onnx"])
    refused("export", dense_directory, "--out", tmp_path / "out", says=["--to"])
    refused("export", tmp_path / "nowhere", "--to", "dense", "--out", tmp_path / "out", says=["nowhere"])
    for to in ("dense", "onnx"):
        refused("export", dense_directory, "--to", to, "--out", occupied, says=["not empty"])
    assert os.listdir(tmp_path) == ["occupied"]


@pytest.mark.parametrize("package", PACKAGES["onnx"])
def test_missing_packages_are_named(refused, monkeypatch, dense_directory, tmp_path, package):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "tensorfold.export.tracing.importlib.util.find_spec", lambda name: None if name == package else found(name)
    )
    refused(
        "export", dense_directory, "--to", "onnx", "--out", tmp_path / "out", says=[f"run: pip install {package}\n"]
    )
    assert os.listdir(tmp_path) == []


def test_onnx_takes_float32(make, tmp_path):
    pytest.importorskip("onnx")
    with pytest.raises(InputError, match=r"bfloat16; needed float32"):
        export_onnx(make("llama", mlp=MLP["kronecker"]).to(torch.bfloat16), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_dense_model_becomes_a_graph_by_command(command, tiny, tokenizer, tmp_path):
    """And its tied head is stored once."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    tiny("llama", num_hidden_layers=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    outcome = command("export", tmp_path / "model", "--to", "onnx", "--out", tmp_path / "out", "--json")
    assert outcome.status == 0, outcome.err
    report = json.loads(outcome.out)
    path = tmp_path / "out" / "model.onnx"
    assert path.stat().st_size == report["bytes"]
    # Equal tensors, such as fresh norms, are stored once as well.
    assert 0.99 * report["parameters"] < floats_in(onnx.load(path)) < report["parameters"] + 128
    assert report["difference"] < 1e-3
    assert "KV cache" in command("export", "--help").out
