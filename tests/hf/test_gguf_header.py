"""Headers of GGUF files, and that whoever reads a quantised model is told what its weights are."""

import json

import numpy as np
import pytest

from tensorfold.errors import InputError
from tensorfold.hf import sources
from tensorfold.hf.gguf_header import read_gguf_header
from tensorfold.hf.model_card import model_card, source_line

gguf = pytest.importorskip("gguf")

TYPES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
HALF = ("--keep", "0.5")


def write(path, types):
    """A file with a tensor of shape (3, 64) of each type."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 7)
    writer.add_uint32("llama.vocab_size", 300)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_array("tokenizer.ggml.tokens", ["a", "ß", "<unk>"])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0])
    writer.add_float32("llama.rope.freq_base", 10000.0)
    for number, name in enumerate(types):
        kind = gguf.GGMLQuantizationType[name]
        values = np.random.default_rng(number).normal(size=(3, 64)).astype(np.float32)
        writer.add_tensor(f"blk.{number}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("types", [TYPES, ["Q4_1", "Q8_0", "F32"], ["F16"], []])
def test_a_header_is_what_the_reader_of_gguf_says(tmp_path, types):
    path = write(tmp_path / "model.gguf", types)
    header, reader = read_gguf_header(path), gguf.GGUFReader(path)
    assert [(t.name, t.shape, t.type) for t in header.tensors] == [
        (t.name, tuple(int(n) for n in reversed(t.shape)), t.tensor_type.name) for t in reader.tensors
    ]
    assert header.metadata["llama.block_count"] == 7
    assert header.metadata["tokenizer.ggml.tokens"] == ["a", "ß", "<unk>"]
    assert header.metadata["tokenizer.ggml.scores"] == [0.5, -1.0]
    assert header.metadata["general.architecture"] == "llama"
    assert header.bytes == path.stat().st_size
    assert header.numbers == dict.fromkeys(types, 192)
    assert header.quantised == any(name.startswith("Q") for name in types)


@pytest.mark.parametrize("length", [0, 3, 4, 10, 24, 60, 150, 250])
def test_a_header_that_is_cut_short_is_bad_input(tmp_path, length):
    whole = write(tmp_path / "whole.gguf", TYPES).read_bytes()
    path = tmp_path / "model.gguf"
    path.write_bytes(whole[:length])
    with pytest.raises(InputError, match="cannot be read as a GGUF model"):
        read_gguf_header(path)


@pytest.mark.parametrize(
    "junk", [b"\xff" * 64, b"GGUF\x09\x00\x00\x00" + bytes(64), b"GGUF\x03\x00\x00\x00" + b"\xff" * 64]
)
def test_junk_is_bad_input(tmp_path, junk):
    path = tmp_path / "model.gguf"
    path.write_bytes(junk)
    with pytest.raises(InputError, match="cannot be read as a GGUF model"):
        read_gguf_header(path)


@pytest.fixture
def quantised(tmp_path, dense_directory, monkeypatch):
    """A quantised file whose conversion, which takes a tokenizer too, is the tiny model's directory."""
    monkeypatch.setattr(sources, "converted", lambda _: dense_directory)
    return write(tmp_path / "tiny.gguf", ["Q4_1", "Q4_1", "Q8_0", "F32"])


SAID = "384 numbers in Q4_1, 192 numbers in Q8_0, 192 numbers in F32 of tiny.gguf"


def test_plan_says_what_a_quantised_source_is(command, quantised, dense_directory):
    plain = command("plan", dense_directory, *HALF)
    outcome = command("plan", quantised, *HALF)
    assert f"source: {SAID}" in outcome.out
    assert "dequantised on reading" in outcome.out
    assert "source:" not in plain.out
    source = json.loads(command("plan", quantised, *HALF, "--json").out)["source"]
    assert source["numbers"] == {"Q4_1": 384, "Q8_0": 192, "F32": 192}
    assert source["bytes"] == quantised.stat().st_size


def test_plan_says_nothing_of_a_file_in_full_precision(command, tmp_path, dense_directory, monkeypatch):
    monkeypatch.setattr(sources, "converted", lambda _: dense_directory)
    outcome = command("plan", write(tmp_path / "tiny.gguf", ["F32", "F16"]), *HALF)
    assert outcome.status == 0
    assert "source:" not in outcome.out


def test_the_card_of_a_fold_says_it_and_healing_keeps_it(command, quantised, tmp_path, text_file):
    folded, healed = tmp_path / "folded", tmp_path / "healed"
    assert command("fold", quantised, *HALF, "--out", folded).status == 0
    assert SAID in (folded / "README.md").read_text()
    settings = ("--set", "validation_fraction=0.2", "--steps", "1", "--block", "16", "--batch", "1")
    assert command("heal", folded, "--train", text_file, *settings, "--out", healed).status == 0
    for directory in (folded, healed):
        assert json.loads((directory / "tensorfold.json").read_text())["source"]["file"] == "tiny.gguf"
        assert SAID in (directory / "README.md").read_text()


@pytest.mark.parametrize("stored", [{}, {"numbers": 3, "file": None, "bytes": "many"}, {"numbers": {"Q": None, 1: 2}}])
def test_a_card_from_anyone_is_no_reason_to_fail(stored):
    assert "dequantised on reading" in source_line(stored)
    assert "dequantised on reading" in model_card({"source": stored})
    assert "dequantised" not in model_card({"source": 3})
