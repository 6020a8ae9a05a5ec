"""Folding from disk to disk: the files of the ordinary fold, byte for byte, without the model in memory."""

import json
import logging
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tensorfold
from tensorfold import Graded, InputError, Kronecker, LowRank, Recipe, Rule, TokenMPS
from tensorfold.folding.from_disk import fold_stream, model_facts, plan_stream
from tensorfold.hf import on_disk as stored
from tensorfold.hf.loading import save
from tensorfold.hf.on_disk import NotStoredError, find_stored
from tensorfold.hf.shard_writer import ShardWriter
from tensorfold.hf.sources import find_model

MLP, ATTENTION = Rule("mlp", LowRank(keep=0.5)), Rule("attention", Kronecker(factor=(8, 4), terms=3, scalars=True))
TABLES = {
    "low-rank": LowRank(keep=0.5),
    "clustered": Kronecker(factor=(30, 8), terms=3, order="cluster"),
    "graded": Graded(keep=0.5),
    "token-mps": TokenMPS(rank=2),
    "dense": None,
}


def recipe(table="low-rank", head=False):
    method = TABLES[table]
    tables = [] if method is None else [Rule("embedding", method)]
    return Recipe((*tables, *([Rule(["lm_head"], LowRank(keep=0.6))] if head else []), MLP, ATTENTION))


@pytest.fixture
def checkpoint(tiny, tokenizer, tmp_path):
    """``checkpoint(architecture, dtype, shard, **settings)``: a directory with a random model and the tokenizer."""

    def make(architecture, dtype=torch.float32, shard="1GB", **settings):
        path = tmp_path / "dense"
        model = tiny(architecture, **settings).to(dtype)
        with torch.no_grad():  # architectures start with biases of zero
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
        model.save_pretrained(path, max_shard_size=shard)
        tokenizer.save_pretrained(path)
        return path

    return make


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def tensors(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def streamed(path, chosen, out):
    source = find_model(str(path))
    return fold_stream(plan_stream(source, chosen), out, source.tokenizer(), lambda r: model_facts(source, "own", r))


def loaded_and_folded(path, chosen, out):
    source = find_model(str(path))
    model = source.model()
    report = tensorfold.fold(model, chosen)
    save(model, source.tokenizer(), out, model_facts(source, "own", report))
    return report


@pytest.mark.parametrize(
    ("architecture", "tied", "dtype"),
    [(name, True, torch.float32) for name in ("gpt2", "llama", "qwen2", "gemma3", "opt", "phi")]
    + [("llama", False, torch.float32), ("gpt2", True, torch.bfloat16), ("qwen2", False, torch.bfloat16)],
)
def test_the_files_are_those_of_the_ordinary_fold(checkpoint, tmp_path, architecture, tied, dtype):
    path = checkpoint(architecture, dtype, tied=tied)
    chosen = recipe(head=not tied and architecture != "phi")
    before = loaded_and_folded(path, chosen, tmp_path / "loaded")
    after = streamed(path, chosen, tmp_path / "streamed")
    assert {**after.to_dict(), "seconds": 0} == {**before.to_dict(), "seconds": 0}
    assert contents(tmp_path / "streamed") == contents(tmp_path / "loaded")
    model = tensorfold.load(tmp_path / "streamed")
    assert model.dtype == dtype
    assert sum(weight.numel() for weight in model.parameters()) == after.parameters_after


@pytest.mark.parametrize(
    ("architecture", "table"), [("gpt2", "graded"), ("gpt2", "token-mps"), ("gpt2", "dense"), ("gemma3", "clustered"),
                                ("phi", "clustered")],
)  # fmt: skip
def test_every_kind_of_table(checkpoint, tmp_path, architecture, table):
    path = checkpoint(architecture)
    loaded_and_folded(path, recipe(table), tmp_path / "loaded")
    streamed(path, recipe(table), tmp_path / "streamed")
    assert contents(tmp_path / "streamed") == contents(tmp_path / "loaded")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_from_shards_to_shards(checkpoint, tmp_path, monkeypatch, dtype):
    path = checkpoint("qwen2", dtype, shard="10KB", tied=False)
    monkeypatch.setattr("tensorfold.folding.from_disk.MAX_SHARD_BYTES", 10_000)
    monkeypatch.setattr("tensorfold.folding.from_disk._CHUNK", 7)  # pieces that end within rows
    out = tmp_path / "streamed"
    tensorfold.fold_directory(path, recipe(), out)
    model = tensorfold.load(path)
    tensorfold.fold(model, recipe())
    model.save_pretrained(tmp_path / "loaded", max_shard_size=10_000)
    assert len(list(path.glob("*.safetensors"))) > 5
    assert len(list(out.glob("*.safetensors"))) > 3
    ours, theirs = tensors(out), tensors(tmp_path / "loaded")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    loaded = tensorfold.load(out)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_checkpoint_of_the_body_alone(tiny, tmp_path, tokenizer):
    """GPT-2's own files lack the ``transformer.`` that the causal model puts first."""
    path = tmp_path / "dense"
    tiny("gpt2").transformer.save_pretrained(path)
    tokenizer.save_pretrained(path)
    loaded_and_folded(path, recipe(), tmp_path / "loaded")
    streamed(path, recipe(), tmp_path / "streamed")
    assert tensors(tmp_path / "streamed").keys() == tensors(tmp_path / "loaded").keys()
    assert contents(tmp_path / "streamed") == contents(tmp_path / "loaded")


def test_the_command_does_not_load_the_model(command, dense_directory, tmp_path, monkeypatch, caplog):
    fold = ("fold", dense_directory, "--keep", "0.5", "--calibrate", "none", "--json", "--out")
    assert command(*fold, tmp_path / "streamed").status == 0
    with caplog.at_level(logging.DEBUG, logger="tensorfold.cli.fold"), monkeypatch.context() as patched:
        patched.setattr("tensorfold.folding.from_disk.find_stored", refuse)
        assert command(*fold, tmp_path / "loaded").status == 0
    assert "loaded whole: not here" in caplog.text
    assert contents(tmp_path / "streamed") == contents(tmp_path / "loaded")
    monkeypatch.setattr("tensorfold.hf.sources.load", None)
    assert command(*fold, tmp_path / "again").status == 0


def refuse(_):
    raise NotStoredError("not here")


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"untie": True}, "unties"),
        ({"layers": (0,)}, "drops"),
        ({"fold": (Rule("attention", LowRank(keep=0.5), split=2),)}, "splits"),
        ({"fold": (Rule("mlp", Kronecker(keep=0.5, permute="hidden")),)}, "reorders hidden units"),
    ],
)
def test_recipes_that_need_the_whole_model(dense_directory, tmp_path, entry, says):
    with pytest.raises(InputError, match=rf"{says}.*use tensorfold\.fold"):
        tensorfold.fold_directory(dense_directory, Recipe(**{"fold": (MLP,), **entry}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def drop(tensors):
    del tensors["model.norm.weight"]


def add(tensors):
    tensors["model.extra.weight"] = torch.ones(3)


def mix(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()


def cut(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


def own_head(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


@pytest.mark.parametrize(
    ("change", "says"),
    [(drop, "has no model.norm"), (add, "extra"), (mix, "float16"), (cut, "model.norm"), (own_head, "lm_head")],
)
def test_weights_that_are_not_the_models(edited, tmp_path, change, says):
    with pytest.raises(InputError, match=says):
        tensorfold.fold_directory(edited("dense", tensors=change), LowRank(keep=0.5), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_and_foreign_files(edited, folded_directory, tmp_path, tiny):
    path = edited("dense")
    with (path / "model.safetensors").open("r+b") as file:
        file.truncate(50_000)
    with pytest.raises(NotStoredError, match="no safetensors that can be read"):
        find_stored(str(path))
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(InputError, match="cannot be read as an index of shards"):
        find_stored(str(path))
    with pytest.raises(NotStoredError, match="folded"):
        find_stored(str(folded_directory))
    with pytest.raises(InputError, match="no-such/model"):
        find_stored("no-such/model")


def test_a_nan_that_is_not_folded_is_kept_and_named(edited, tmp_path, caplog):
    def spoil(tensors):
        tensors["model.norm.weight"][3] = float("nan")
        tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = float("inf")

    path = edited("dense", tensors=spoil)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj.*NaN or infinity.*exclude"):
        tensorfold.fold_directory(path, LowRank(keep=0.5), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    tensorfold.fold_directory(path, Recipe((Rule("attention", LowRank(keep=0.5)),)), tmp_path / "out")
    assert "model.norm.weight holds NaN" in caplog.text
    assert "up_proj.weight holds NaN" in caplog.text


def test_a_directory_without_a_tokenizer(tiny, tmp_path):
    tiny("gpt2").save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "dense" / "config.json").read_text()) | {"dtype": None})
    )
    report = tensorfold.fold_directory(tmp_path / "dense", LowRank(keep=0.5), tmp_path / "out")
    assert tensorfold.load(tmp_path / "out").num_parameters() == report.parameters_after
    assert "folded with tensorfold" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(InputError, match="already exists"):
        tensorfold.fold_directory(tmp_path / "dense", LowRank(keep=0.5), tmp_path / "out")


def test_a_recipes_text_is_not_read(dense_directory, tmp_path):
    with_text = {"fold": [{"targets": "mlp", "method": "low-rank", "keep": 0.5}], "calibrate": {"text": "wikitext-2"}}
    with pytest.warns(UserWarning, match="reads no text"):
        tensorfold.fold_directory(dense_directory, with_text, tmp_path / "out")


def test_the_writers_files_are_those_of_safetensors(tmp_path):
    given = {
        "b": torch.randn(3, 4), "a.é": torch.randn(5).bfloat16(), "index": torch.arange(7),
        "half": torch.ones(2).half(), "double": torch.ones(1).double(), "bytes": torch.arange(4).to(torch.int8),
        "none": torch.tensor(2.0), "flag": torch.tensor([True]), "small": torch.ones(3, dtype=torch.uint8),
        "word": torch.ones(2, dtype=torch.int32),
    }  # fmt: skip
    (tmp_path / "ours").mkdir()
    with ShardWriter(tmp_path / "ours", {name: t.to("meta") for name, t in given.items()}, 0, 999) as writer:
        for name, tensor in reversed(given.items()):
            for start in range(0, tensor.numel(), 2):
                writer.write(name, tensor.reshape(-1)[start : start + 2], start)
    save_file(given, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_the_writer_wants_everything_and_nothing_else(tmp_path):
    empty = {"a": torch.empty(3, device="meta")}
    with (
        pytest.raises(ValueError, match="never written, or not once: a"),
        ShardWriter(tmp_path, empty, 3, 99) as writer,
    ):
        writer.write("a", torch.ones(2))
    with pytest.raises(ValueError, match=r"needed torch\.float32"), ShardWriter(tmp_path, empty, 3, 99) as writer:
        writer.write("a", torch.ones(3).half())


def resident(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key)) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_model_is_never_in_memory(checkpoint, tmp_path):
    """Two tables of 64 MB are copied and small matrices folded; the peak grows by neither table."""
    path = checkpoint("llama", shard="70MB", tied=False, vocab_size=500_000)
    chosen = Recipe((Rule("mlp", LowRank(rank=4)),))
    streamed(path, chosen, tmp_path / "first")  # imports that are made late count for nothing
    stream, table = plan_stream(find_model(str(path)), chosen), 4 * 500_000 * 32
    assert sum(file.stat().st_size for file in path.glob("*.safetensors")) > 2 * table
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from here
    fold_stream(stream, tmp_path / "out", None, lambda report: model_facts(find_model(str(path)), "own", report))
    assert resident("VmHWM") - before < table


def test_planning_reads_headers_alone(dense_directory, monkeypatch):
    class Headers:
        """A file whose tensors cannot be read."""

        def __init__(self, *given, **options):
            self.file = safe_open(*given, **options)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def keys(self):
            return self.file.keys()

        def get_slice(self, name):
            return self.file.get_slice(name)

    monkeypatch.setattr(stored, "safe_open", Headers)
    found = find_stored(str(dense_directory))
    assert found.files.keys() == set(load_file(dense_directory / "model.safetensors"))
