"""Checkpoints may come from anyone: no pickle is read, no code of theirs runs, no path leads outside, nothing absurd is
allocated."""

import json
import pickle
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tensorfold
from tensorfold.cli.main import run
from tensorfold.errors import InputError

SOURCES = Path(tensorfold.__file__).parent
HALF = ("--keep", "0.5")
EVAL = ("--protocol", "disjoint-64")


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.fixture
def everywhere(refused, fold_refused, text_file):
    """Every command that loads a model refuses the directory, saying so."""

    def check(path, *, says, plan=False):
        fold_refused(path, *HALF, says=says)
        refused("eval", path, "--text", text_file, *EVAL, says=says)
        refused("export", path, "--to", "dense", "--out", "out", says=says)
        refused("push", path, "owner/name", "--dry-run", says=says)
        with pytest.raises(InputError, match=re.escape(says[0])):
            tensorfold.load(path)

    return check


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_not_read(everywhere, edited, tmp_path, name):
    path = edited("dense")
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save(weights, path / name)
    everywhere(path, says=["pickles", name, "safetensors"])
    (path / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    everywhere(path, says=["pickles", name])
    assert not (tmp_path / "sprung").exists()


def test_pickles_of_an_adapter_are_not_read(everywhere, edited):
    path = edited("dense")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/"}))
    (path / "adapter_model.bin").write_bytes(pickle.dumps(Trap(path / "sprung")))
    everywhere(path, says=["pickles", "adapter_model.bin"])
    assert not (path / "sprung").exists()


def test_no_module_of_ours_reads_pickles_or_trusts_code():
    """``utils.distributed`` pickles an error to see whether it can be sent; torch.load and foreign code are nowhere."""
    for path in SOURCES.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert "torch.load(" not in source, path
        assert not re.search(r"from_\w+\([^)]*trust_remote_code=True", source), path
        assert path.name == "distributed.py" or not re.search(r"^\s*(import|from) pickle", source, re.MULTILINE), path


def test_code_beside_a_model_is_not_run(everywhere, edited, tmp_path):
    """``auto_map`` names it; transformers asks at the terminal where nobody has said yes or no."""
    auto = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": "evil.Words"}
    path = edited("dense", config=lambda config: config.update(model_type="evil", auto_map=auto))
    (path / "evil.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    everywhere(path, says=["comes with code of its own", "trust_remote_code=True"])
    shutil.rmtree(path)
    path = edited("dense", config=lambda config: config.update(auto_map=auto))
    (path / "evil.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    assert tensorfold.load(path).config.model_type == "llama"  # a type of transformers' own needs none of it
    assert not (tmp_path / "sprung").exists()


@pytest.fixture
def sharded(tiny, tokenizer, tmp_path):
    path = tmp_path / "sharded"
    tiny("llama").save_pretrained(path, max_shard_size="40KB")
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("outside", ["../dense/model.safetensors", "{dense}", "/etc/passwd", "sub/x.safetensors", ".",
                                     "", "a\0b.safetensors", 3, None, "config.json"])  # fmt: skip
def test_an_index_that_leads_outside(everywhere, sharded, edited, outside):
    dense = edited("dense")
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    if isinstance(outside, str):
        outside = outside.format(dense=dense / "model.safetensors")
    content["weight_map"]["model.norm.weight"] = outside
    index.write_text(json.dumps(content))
    everywhere(sharded, says=[str(index)])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 9000])
def test_an_index_that_is_none(everywhere, sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    everywhere(sharded, says=["model.safetensors.index.json"])


def test_weights_that_the_configuration_puts_outside(everywhere, edited):
    path = edited("dense", config=lambda config: config.update(transformers_weights="../other/model.safetensors"))
    with pytest.raises(InputError, match="inside the model directory"):
        tensorfold.load(path)


def test_a_linked_shard_is_read(sharded, tmp_path):
    """The hub's cache is laid out so: links to blobs elsewhere."""
    blob = tmp_path / "blob"
    shard = sorted(sharded.glob("model-*.safetensors"))[0]
    shard.rename(blob)
    shard.symlink_to(blob)
    assert tensorfold.load(sharded).num_parameters() == 25120


def header_of(path, change):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


@pytest.fixture
def little_memory():
    """Room for a hundred megabytes more than the process has already."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 10**8, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
class TestAbsurdSizes:
    @pytest.mark.parametrize("shape", [[10**6, 10**6], [2**63, 2], [10**12]])
    def test_of_a_tensor(self, everywhere, edited, little_memory, shape):
        path = edited("dense")
        header_of(path / "model.safetensors", lambda h: h["model.norm.weight"].update(shape=shape))
        everywhere(path, says=[str(path)])

    @pytest.mark.parametrize("length", [2**40, 2**63, 2**64 - 1])
    def test_of_a_header(self, everywhere, edited, little_memory, length):
        path = edited("dense")
        data = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + data[8:])
        everywhere(path, says=[str(path)])

    @pytest.mark.parametrize(
        "spec",
        [
            {"out_modes": [10**12, 1], "in_modes": [1, 32], "ranks": [9], "out_features": 48},
            {"out_modes": [48, 10**6], "in_modes": [10**6, 32], "ranks": [9], "out_features": 48, "in_features": 32},
        ],
    )
    def test_of_a_folded_module(self, refused, edited, little_memory, text_file, spec):
        name = "model.layers.0.mlp.gate_proj"
        path = edited("folded", config=lambda c: c["quantization_config"]["modules"].update({name: spec}))
        refused("eval", path, "--text", text_file, *EVAL, says=["at most 16 times"])
        refused("export", path, "--to", "dense", "--out", "out", says=["at most 16 times"])
        refused("report", path, "--no-samples", "--out", "out.html", says=["at most 16 times"])

    @pytest.mark.parametrize(
        "entry",
        [
            "{targets: mlp, method: mpo, bond: 4, out_modes: [1000000, 1000000], in_modes: [1000000, 1000000]}",
            "{targets: embedding, method: token-mps, modes: [1000000, 1000000], rank: 2}",
            "{targets: mlp, method: low-rank, rank: 1000000000000}",
            "{targets: mlp, method: kronecker, factor: [1000000000000, 1]}",
            "{targets: mlp, method: mpo, bond: 4, sites: 3000000000}",
        ],
    )
    def test_of_a_recipe(self, fold_refused, refused, dense_directory, little_memory, tmp_path, entry):
        (tmp_path / "own.yaml").write_text(f"fold: [{entry}]")
        fold_refused(dense_directory, "--recipe", tmp_path / "own.yaml", says=[])
        refused("plan", dense_directory, "--recipe", tmp_path / "own.yaml", says=[])


def test_run_refuses_bytes_that_are_not_utf8(capsys):
    with pytest.raises(SystemExit) as stopped:
        run(["plan", "\udcff", *HALF])
    assert stopped.value.code == 2
    assert "not UTF-8" in capsys.readouterr().err
