"""Every identity that a run is resumed by covers all bytes: one changed bit, wherever it is, makes another run."""

import copy
import json
import os

import numpy as np
import pytest
import torch
from torch import nn

import tensorfold
from tensorfold import InputError, LowRank, Recipe, Rule
from tensorfold.data.encode import tokenizer_fingerprint
from tensorfold.data.token_cache import TokenCache
from tensorfold.folding.inputs import identity
from tensorfold.folding.text import Text
from tensorfold.healing import checkpoints
from tensorfold.healing.blockwise import heal_blocks
from tensorfold.healing.heal import heal
from tensorfold.recipes.settings import HealSettings
from tensorfold.utils.fingerprints import hash_json, hash_model, hash_tensor, hash_tensors, saved_tensors

RECIPE = Recipe((Rule("mlp", LowRank(keep=0.5)),))


def flip(tensor):
    """Flip the lowest bit of a tensor's middle number, whatever its strides are."""
    with torch.no_grad():
        middle = tensor.data[tuple(size // 2 for size in tensor.shape)].reshape(1)
        middle.view(torch.uint8)[0] ^= 1


IDENTITIES = {
    "healing": checkpoints.fingerprint,
    "folding": lambda model: hash_json(identity(model, RECIPE, Text())),
    "model": hash_model,
}


@pytest.mark.parametrize("name", IDENTITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_number_of_a_model_counts(tiny, name, dtype):
    fingerprint = IDENTITIES[name]
    model = tiny("gpt2").to(dtype)
    model.transformer.register_buffer("counts", torch.arange(2000))
    model.transformer.register_buffer("scratch", torch.zeros(3), persistent=False)
    whole = fingerprint(model)
    assert fingerprint(copy.deepcopy(model)) == whole
    for where, tensor in saved_tensors(model):
        flip(tensor)
        assert fingerprint(model) != whole, where
        flip(tensor)
    assert fingerprint(model) == whole
    model.transformer.scratch += 1
    assert fingerprint(model) == whole, "what is not saved is no part of the model"
    model.config.layer_norm_epsilon = 0.1
    assert fingerprint(model) != whole


def test_a_fingerprint_does_not_depend_on_where_a_model_lies(tiny):
    one, other = tiny("llama"), tiny("llama")
    other.config._name_or_path, other.config.transformers_version = "/elsewhere", "5.99.0"
    assert hash_model(one) == hash_model(other)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn]
)
def test_a_tensor_is_its_type_its_shape_and_its_bytes(dtype):
    plain = torch.zeros(6, 8).to(dtype)
    turned = plain.t().contiguous().t()
    assert not turned.is_contiguous()
    assert hash_tensor(turned) == hash_tensor(plain)
    others = [plain.reshape(8, 6), plain.reshape(-1), torch.zeros(6, 8, dtype=torch.int32), torch.ones(6, 8).to(dtype)]
    assert len({hash_tensor(each) for each in [plain, *others]}) == 5
    assert hash_tensor(torch.zeros((), dtype=dtype)) != hash_tensor(torch.zeros(0, dtype=dtype))


def test_names_and_order_count():
    a, b = torch.zeros(2), torch.ones(2)
    found = {
        hash_tensors(each) for each in ([("a", a), ("b", b)], [("b", b), ("a", a)], [("a", a)], [("x", a), ("b", b)])
    }
    assert len(found) == 4


def test_tied_weights_are_hashed_once(tiny):
    assert "lm_head.weight" not in dict(saved_tensors(tiny("gpt2")))
    assert "lm_head.weight" in dict(saved_tensors(tiny("gpt2", tied=False)))


FAST = {"steps": 2, "batch": 4, "block": 16, "lr": 1e-3, "validation_fraction": 0.1}


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_another_training_is_no_run_to_go_on_with(
    folded_directory, tiny, tokenizer, text_file, tmp_path, who, monkeypatch
):
    models = {"student": tensorfold.load(folded_directory), "teacher": tiny("llama")}

    def run():
        return heal(models["student"], text_file, models["teacher"], tokenizer=tokenizer, out=tmp_path / "out", **FAST)

    with monkeypatch.context() as patch:
        patch.setattr("tensorfold.healing.heal.write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run()
    flip(models[who].model.layers[1].self_attn.q_proj.weight)
    with pytest.raises(InputError, match=f"the {'model to heal' if who == 'student' else 'teacher'} changed since"):
        run()
    flip(models[who].model.layers[1].self_attn.q_proj.weight)
    assert run().steps == 2


@pytest.mark.parametrize("who", ["student", "teacher", "windows"])
def test_healed_blocks_belong_to_their_models_and_tokens(tiny, tmp_path, who):
    teacher, windows = tiny("llama"), torch.arange(64).reshape(4, 16)
    student = copy.deepcopy(teacher)
    tensorfold.fold(student, RECIPE)
    settings = HealSettings(blockwise_epochs=1)
    heal_blocks(copy.deepcopy(student), teacher, windows, settings, checkpoint=tmp_path)
    changed = {"student": student.model.norm.weight, "teacher": teacher.model.norm.weight, "windows": windows}[who]
    flip(changed)
    with pytest.raises(InputError, match="blocks of another healing run"):
        heal_blocks(copy.deepcopy(student), teacher, windows, settings, checkpoint=tmp_path)


def test_every_token_of_a_cache_is_checked(tmp_path):
    """Flip a bit in the middle of four megabytes, and give the file its old times back."""
    from byte_tokenizer import Bytes

    (tmp_path / "a.txt").write_text("A short text.\n")
    cached = TokenCache.build(tmp_path / "a.txt", Bytes(), 8, cache_dir=tmp_path / "cache")
    tokens = np.zeros(2**21, dtype=cached.dtype)
    file, sidecar = cached.path / "tokens.bin", cached.path / "cache.json"
    tokens.tofile(file)
    described = json.loads(sidecar.read_text()) | {"tokens": len(tokens), "sha256": checkpoints.hash_file(file)}
    sidecar.write_text(json.dumps(described))
    assert TokenCache.open(cached.path).tokens == len(tokens)
    times = file.stat()
    tokens[2**20] = 1
    tokens.tofile(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(InputError, match=r"checksum of tokens\.bin differs"):
        TokenCache.open(cached.path)


def test_a_tokenizer_in_python_is_more_than_its_vocabulary(tmp_path):
    from transformers import CTRLTokenizer

    words = {"<unk>": 0, "a@@": 1, "b": 2, "ab": 3, "b@@": 4, "a": 5}
    (tmp_path / "vocab.json").write_text(json.dumps(words))

    def made(folder, merges):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
        return CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / folder / "merges.txt"))

    one, same, other = made("1", "a b</w>"), made("2", "a b</w>"), made("3", "b a</w>")
    assert one.tokenize("ab") != other.tokenize("ab")
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(same) != tokenizer_fingerprint(other)


def test_a_module_without_values_has_a_hash():
    with torch.device("meta"):
        assert hash_tensor(nn.Linear(3, 4).weight) == hash_tensor(nn.Linear(3, 4).weight)
