"""Calibrated folding block by block: the bytes of the fold in memory, from a model that is never in memory."""

import json

import pytest
import torch

import tensorfold
from tensorfold import Auto, Graded, LowRank, Recipe, Rule
from tensorfold.folding.from_disk import model_facts
from tensorfold.folding.out_of_core import fold_out_of_core
from tensorfold.hf.loading import save
from tensorfold.hf.sources import find_model
from tensorfold.utils.block_checkpoints import BlockCheckpoints

TOKENS = 256
AUTO = Rule("all-linear", Auto(keep=0.6))
RECIPES = {
    "auto": Recipe((AUTO,)),
    "low-rank": Recipe((Rule("all-linear", LowRank(keep=0.5)),)),
    "table": Recipe((Rule("embedding", Graded(keep=0.5)), AUTO)),
}


@pytest.fixture
def checkpoint(tiny, tokenizer, tmp_path):
    def make(architecture, dtype=torch.float32, shard="1GB", **settings):
        path = tmp_path / "dense"
        tiny(architecture, **settings).to(dtype).save_pretrained(path, max_shard_size=shard)
        tokenizer.save_pretrained(path)
        return path

    return make


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def in_memory(path, recipe, prose, out):
    source = find_model(str(path))
    model, tokenizer = source.model(), source.tokenizer()
    report = tensorfold.fold(model, recipe, tokenizer, [prose], calibration_tokens=TOKENS)
    save(model, tokenizer, out, model_facts(source, "own", report))
    return report


def block_by_block(path, recipe, prose, out):
    source = find_model(str(path))

    def card(report):
        return model_facts(source, "own", report)

    return fold_out_of_core(source, recipe, out, source.tokenizer(), [prose], TOKENS, card, 10**9)


@pytest.mark.parametrize(
    ("architecture", "recipe", "dtype"),
    [("llama", "auto", torch.float32), ("llama", "auto", torch.bfloat16), ("gpt2", "auto", torch.float32),
     ("gemma3", "table", torch.float32), ("opt", "low-rank", torch.float32), ("phi", "auto", torch.float32)],
)  # fmt: skip
def test_the_files_are_those_of_the_fold_in_memory(checkpoint, prose, tmp_path, architecture, recipe, dtype):
    path = checkpoint(architecture, dtype)
    before = in_memory(path, RECIPES[recipe], prose, tmp_path / "memory")
    after = block_by_block(path, RECIPES[recipe], prose, tmp_path / "blocks")
    assert {**after.to_dict(), "seconds": 0} == {**before.to_dict(), "seconds": 0}
    assert contents(tmp_path / "blocks") == contents(tmp_path / "memory")
    assert not (tmp_path / "blocks.fold").exists()
    assert tensorfold.load(tmp_path / "blocks").dtype == dtype


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_dense_matrix_follows_the_order_of_the_hidden_units(checkpoint, prose, tmp_path, architecture):
    """In every block, the last one too, whose weights are let go at the end, and of matrices of several pages."""
    sizes = {"hidden_size": 64, "intermediate_size": 256} if architecture == "llama" else {"n_embd": 64, "n_inner": 256}
    path = checkpoint(architecture, **sizes)
    expanding = "up_proj" if architecture == "llama" else "c_fc"
    recipe = Recipe((Rule(expanding, Auto(keep=0.6)),))
    in_memory(path, recipe, prose, tmp_path / "memory")
    block_by_block(path, recipe, prose, tmp_path / "blocks")
    assert contents(tmp_path / "blocks") == contents(tmp_path / "memory")
    dense, folded = find_model(str(path)).model(), tensorfold.load(tmp_path / "memory")
    contracting = "mlp.down_proj.weight" if architecture == "llama" else "mlp.c_proj.weight"
    names = [name for name in dense.state_dict() if name.endswith(contracting)]
    assert names
    for name in names:  # reordered at all, or the test would hold for any fold
        was, now = dense.state_dict()[name], folded.state_dict()[name]
        assert not torch.equal(now, was)
        assert torch.equal(now.flatten().sort().values, was.flatten().sort().values)


def test_shards_are_read_and_left_as_they_are(checkpoint, prose, tmp_path):
    path = checkpoint("llama", shard="40KB", num_hidden_layers=3)
    assert len(list(path.glob("*.safetensors"))) > 2
    was = contents(path)
    report = tensorfold.fold_directory(
        path, RECIPES["auto"], tmp_path / "out", calibration=[prose], calibration_tokens=TOKENS
    )
    assert contents(path) == was
    assert tensorfold.load(tmp_path / "out").num_parameters() == report.parameters_after
    assert (
        "256 tokens of the text given" in json.loads((tmp_path / "out" / "tensorfold.json").read_text())["calibration"]
    )


@pytest.fixture
def fold(dense_directory, text_file):
    return "fold", dense_directory, "--keep", "0.6", "--tokens", "256", "--calibrate", text_file, "--out"


def test_the_command_line(fold, command, tmp_path, monkeypatch):
    assert command(*fold, tmp_path / "memory").status == 0
    assert command(*fold, tmp_path / "blocks", "--low-memory").status == 0
    assert contents(tmp_path / "blocks") == contents(tmp_path / "memory")
    monkeypatch.setattr("tensorfold.folding.in_memory.fold", None)
    monkeypatch.setattr("tensorfold.folding.out_of_core.memory_bytes", lambda: 1000)  # a model larger than memory
    assert command(*fold, tmp_path / "chosen").status == 0
    assert contents(tmp_path / "chosen") == contents(tmp_path / "memory")


@pytest.mark.parametrize(
    ("options", "says"),
    [(("--untie",), "unties"), (("--plain",), "plain makes narrower"), (("--dtype", "bfloat16"), "leave out --dtype"),
     (("--calibrate", "self"), "give a text")],
)  # fmt: skip
def test_what_cannot_go_block_by_block_says_so(fold, refused, tmp_path, options, says):
    refused(*fold, tmp_path / "out", "--low-memory", *options, says=["--low-memory", says])
    assert not (tmp_path / "out").exists()


def test_it_is_refused_on_a_disk_without_room(fold, command, tmp_path, monkeypatch):
    monkeypatch.setattr("tensorfold.folding.out_of_core.disk_need", lambda *_: 10**18)
    done = command(*fold, tmp_path / "out", "--low-memory")
    assert done.status != 0
    assert "needs up to 1000000000.0 GB" in done.err
    assert list(tmp_path.iterdir()) == []


class Killed(BaseException):
    """What no code catches."""


def test_nothing_is_lost_by_kills(checkpoint, prose, tmp_path, monkeypatch):
    """Killed after every block that is saved, the fold goes on from there, to the same bytes."""
    path, save_block, saved = checkpoint("llama"), BlockCheckpoints.save, []
    in_memory(path, RECIPES["auto"], prose, tmp_path / "memory")

    def save_and_die(self, index, *given, **options):
        save_block(self, index, *given, **options)
        saved.append(index)
        raise Killed

    monkeypatch.setattr(BlockCheckpoints, "save", save_and_die)
    kills = 0
    while not (tmp_path / "blocks").exists():
        try:
            block_by_block(path, RECIPES["auto"], prose, tmp_path / "blocks")
        except Killed:
            kills += 1
    assert kills == len(saved) == len(set(saved)) > 5
    assert contents(tmp_path / "blocks") == contents(tmp_path / "memory")
    assert sorted(place.name for place in tmp_path.iterdir()) == ["blocks", "dense", "memory"]
