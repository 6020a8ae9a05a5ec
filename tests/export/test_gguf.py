"""GGUF files of plain models: transformers reads them back, llama.cpp runs them, what has no form there is refused."""

import importlib.util
import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tensorfold
from byte_tokenizer import byte_pairs
from tensorfold import Auto
from tensorfold.errors import InputError, TensorfoldError
from tensorfold.export import gguf_file
from tensorfold.export.engine_model import open_exported
from tensorfold.export.gguf_file import export_gguf
from tensorfold.export.gguf_vocabulary import read_vocabulary

gguf = pytest.importorskip("gguf")

ARCHITECTURES = ["llama", "qwen2", "gpt2", "mistral"]
TEXT = "The cat's 12 mice, 3456 of them!  And\n\n so on</s> it went"


@pytest.fixture
def plain(tiny):
    """``plain(architecture, …)``: a random model whose every weight shows in its logits."""

    def make(architecture, **settings):
        model = tiny(architecture, **settings)
        for parameter in set(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            parameter.data = parameter.data * 6 if parameter.dim() == 2 else parameter.data + 0.1 * noise
        model.tie_weights()
        return model

    return make


@torch.no_grad()
def logits(model, ids=None):
    ids = torch.arange(40).reshape(2, 20) if ids is None else ids
    return model(input_ids=ids, use_cache=False).logits


def read_back(path, **settings):
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, **settings
    ).eval()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_reads_the_logits_back(plain, tokenizer, tmp_path, architecture, tied):
    model = plain(architecture, tied=tied)
    report = export_gguf(model, tmp_path / "out", tokenizer, name="org/Tiny one")
    path = tmp_path / "out" / "Tiny-one-F32.gguf"
    # transformers takes neither the number of positions nor that of hidden units from a file of GPT-2's.
    read = read_back(path, **({"config": model.config} if architecture == "gpt2" else {}))
    assert logits(model).std() > 0.1
    torch.testing.assert_close(logits(read), logits(model), rtol=0, atol=1e-5)
    assert report.difference < 1e-5
    assert report.same_tokens == "32 of 32"
    assert report.bytes == path.stat().st_size
    names = {tensor.name for tensor in gguf.GGUFReader(path).tensors}
    assert ("output.weight" in names) is not tied  # a tied head is written once
    assert sum(report.stored.values()) == report.parameters
    assert {"README.md", path.name, "config.json", "engine.json", "tokenizer.json"} <= set(os.listdir(path.parent))
    assert path.name in (path.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_tokenizer_reads_the_same_tokens(plain, tokenizer, tmp_path, architecture):
    export_gguf(plain(architecture), tmp_path / "model.gguf", tokenizer)
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert read(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert (read.bos_token_id, read.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert os.listdir(tmp_path) == ["model.gguf"]


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_fewer_bits(plain, tokenizer, tmp_path, bits):
    model = plain("llama")
    report = export_gguf(model, tmp_path / "model.gguf", tokenizer, bits=bits)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == {16: "F16", 8: "Q8_0", 4: "Q4_0"}[bits]
    assert kinds["token_embd.weight"] == {16: "F16", 8: "Q8_0", 4: "Q8_0"}[bits]
    assert kinds["blk.0.ffn_down.weight"] == "F16"  # 48 inputs, which are no groups of 32
    assert kinds["output_norm.weight"] == "F32"
    allowed = {16: 0.01, 8: 0.3, 4: 1.5}[bits]
    assert report.difference < allowed
    assert report.bits == bits
    torch.testing.assert_close(logits(read_back(tmp_path / "model.gguf")), logits(model), rtol=0, atol=allowed)


SETTINGS = {
    "base": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "wide heads": ("llama", {"head_dim": 16}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
            }
        },
    ),
    "inner": ("gpt2", {"n_inner": 40}),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_are_in_the_file(plain, tokenizer, tmp_path, case):
    architecture, settings = SETTINGS[case]
    assert export_gguf(plain(architecture, **settings), tmp_path / "model.gguf", tokenizer).difference < 1e-5
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    expected = {
        "base": ("llama.rope.freq_base", 500.0),
        "wide heads": ("llama.attention.key_length", 16),
        "linear": ("llama.rope.scaling.factor", 2.0),
        "llama3": ("llama.rope.freq_base", 1e4),
        "inner": ("gpt2.feed_forward_length", 40),
    }[case]
    assert fields[expected[0]] == expected[1]
    if case == "llama3":
        divisors = next(tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
        torch.testing.assert_close(divisors.tolist(), [1.0, 2.338, 8.0, 8.0], rtol=1e-3, atol=0)


def test_a_fold_to_fewer_units_runs_from_the_file(plain, tokenizer, prose, tmp_path):
    model = plain("llama")
    tensorfold.fold(model, Auto(keep=0.7, plain=True), tokenizer, [prose], calibration_tokens=600)
    assert model.config.intermediate_size < 48
    assert export_gguf(model, tmp_path / "model.gguf", tokenizer).difference < 1e-5


def test_by_command(command, dense_directory, text_file, tmp_path):
    path = tmp_path / "model.gguf"
    outcome = command("export", dense_directory, "--to", "gguf", "--bits", "16", "--out", path, "--json")
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out)["stored"].keys() == {"F16", "F32"}
    assert command("export", dense_directory, "--to", "gguf", "--out", path).status == 0  # a file is replaced
    judged = [
        json.loads(
            command(
                "eval", place, "--text", text_file, "--protocol", "disjoint-64", "--max-tokens", "300", "--json"
            ).out
        )
        for place in (dense_directory, path)
    ]
    assert judged[0]["perplexity"] == pytest.approx(judged[1]["perplexity"], rel=1e-5)


def test_factors_are_refused_with_the_engines_that_take_them(refused, folded_directory, tmp_path):
    refused(
        "export", folded_directory, "--to", "gguf", "--out", tmp_path / "out",
        says=["matrices are factors", "--to onnx or openvino", "--to dense", "plain: true"],
    )  # fmt: skip
    assert os.listdir(tmp_path) == []


REFUSED = {
    "architecture": ("phi", {}, "PhiForCausalLM; needed one of LlamaForCausalLM"),
    "activation": ("llama", {"hidden_act": "gelu"}, "no hidden_act = 'gelu'"),
    "biases": ("llama", {"attention_bias": True}, "no attention_bias = True"),
    "window": ("mistral", {"sliding_window": 16}, "last 16 tokens"),
    "rotation": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused(tiny, tokenizer, tmp_path, case):
    architecture, settings, words = REFUSED[case]
    with pytest.raises(InputError, match=words):
        export_gguf(tiny(architecture, **settings), tmp_path / "out", tokenizer)
    assert os.listdir(tmp_path) == []


def pre_tokenizer(kind):
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    words += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = {"llama-bpe": "{1,3}", "smaug-bpe": "{1,3}", "qwen2": ""}
    if kind in split:
        return Sequence([Split(Regex(words % split[kind]), "isolated"), ByteLevel(False, use_regex=False)])
    steps = {"smollm": [Digits(individual_digits=True), ByteLevel(False)], "spaced": [ByteLevel(True)]}
    return Sequence(steps.get(kind, [ByteLevel(False)]))


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2"])
def test_splits_have_their_names(tiny, tokenizer, prose, kind):
    other = byte_pairs([prose], 300, ["<s>", "</s>"], bos_token="<s>", eos_token="</s>")
    other.backend_tokenizer.pre_tokenizer = pre_tokenizer(kind)
    other.backend_tokenizer.model.ignore_merges = kind == "llama-bpe"
    vocabulary = read_vocabulary(other, tiny("llama"))
    assert vocabulary.split == kind
    assert vocabulary.adds == {"bos": False, "eos": False}
    assert vocabulary.special == {"bos": 0, "eos": 1}


def test_tokens_beyond_the_tokenizer_are_unused_and_added_ones_marked(tiny, prose):
    other = byte_pairs([prose], 280, ["<s>", "</s>"], bos_token="<s>", eos_token="</s>")
    other.add_tokens(["<think>"])
    vocabulary = read_vocabulary(other, tiny("llama"))
    assert len(vocabulary.tokens) == len(vocabulary.kinds) == 300
    assert vocabulary.tokens[280:282] == ["<think>", "[PAD281]"]
    assert vocabulary.kinds[:3] + vocabulary.kinds[279:282] == [3, 3, 1, 1, 4, 5]


def test_tokenizers_that_it_would_read_otherwise_are_refused(tiny, prose):
    from tokenizers import Tokenizer, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    model = tiny("llama")

    def changed(**parts):
        other = byte_pairs([prose], 300, ["<s>", "</s>"], bos_token="<s>", eos_token="</s>")
        for part, value in parts.items():
            setattr(other.backend_tokenizer, part, value)
        return other

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    pair = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    cases = [
        (None, "missing"),
        (PreTrainedTokenizerFast(tokenizer_object=words), "a WordLevel model"),
        (changed(pre_tokenizer=pre_tokenizer("spaced")), "with a space before the text"),
        (changed(normalizer=normalizers.Lowercase()), "normalises text by Lowercase"),
        (changed(post_processor=pair), r"puts the tokens \[1\] before a text"),
        (byte_pairs([prose], 310, ["<s>"]), r"resize_token_embeddings\(310\)"),
    ]
    for other, words_of_it in cases:
        with pytest.raises(InputError, match=words_of_it):
            read_vocabulary(other, model)


def test_a_file_that_is_read_otherwise_is_not_kept(plain, tokenizer, tmp_path, monkeypatch):
    def unturned(layout, model):
        for name, values, fewer in tensors(layout, model):
            yield name, values[::-1] if name == "blk.0.attn_q.weight" else values, fewer

    tensors = gguf_file.tensors
    monkeypatch.setattr(gguf_file, "tensors", unturned)
    for out in (tmp_path / "out", tmp_path / "model.gguf"):
        with pytest.raises(TensorfoldError, match="differ from the model's"):
            export_gguf(plain("llama"), out, tokenizer)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_llama_cpp_generates_the_models_tokens(plain, tokenizer, tmp_path, architecture):
    llama_cpp = pytest.importorskip("llama_cpp")
    model, path = plain(architecture), tmp_path / "model.gguf"
    export_gguf(model, path, tokenizer)
    engine = llama_cpp.Llama(str(path), n_ctx=96, n_threads=1, verbose=False)
    assert engine.tokenize(TEXT.encode(), add_bos=False, special=True) == tokenizer(TEXT).input_ids
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    for token, _ in zip(engine.generate(ids[0].tolist(), temp=0.0), range(16), strict=False):
        expected = logits(model, ids)[0, -1].argmax()
        assert token == expected
        ids = torch.cat([ids, expected.reshape(1, 1)], 1)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_directory_runs_in_llama_cpp(plain, tokenizer, tmp_path, command, bits):
    pytest.importorskip("llama_cpp")
    model, path = plain("llama", max_position_embeddings=64), tmp_path / "out"
    export_gguf(model, path, tokenizer, bits=bits)
    graph = open_exported(path)
    assert graph.stored_type == f"llama.cpp {'F32' if bits == 32 else 'Q8_0'}"
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    close = {"rtol": 0, "atol": 0.01 if bits == 32 else 0.2}  # keys and values are in float16
    torch.testing.assert_close(graph(ids).logits, logits(model, ids), **close)
    first = graph(ids[:, :5])
    second = graph(ids[:, 5:], past_key_values=first.past_key_values, logits_to_keep=2)
    torch.testing.assert_close(second.logits, logits(model, ids)[:, -2:], **close)
    rows, mask = ids[:, :8].repeat(2, 1), torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    both = graph(rows, mask).logits
    torch.testing.assert_close(both[0], logits(model, ids[:, :8])[0], **close)
    torch.testing.assert_close(both[1, 3:], logits(model, ids[:, 3:8])[0], **close)
    settings = {"max_new_tokens": 8, "do_sample": False}
    if bits == 32:
        torch.testing.assert_close(graph.generate(ids, **settings), model.generate(ids, **settings))
    with pytest.raises(InputError, match="goes on from one row"):
        graph(rows[:, :1], past_key_values=graph(rows).past_key_values)
    with pytest.raises(InputError, match="holds another cache"):
        graph(ids[:, :1], past_key_values=first.past_key_values)
    (tmp_path / "text.txt").write_text(TEXT * 20, encoding="utf-8")
    settings = ["--protocol", "disjoint-32", "--json"]
    result = json.loads(command("eval", path, "--text", tmp_path / "text.txt", *settings).out)
    assert result["dtype"] == graph.stored_type
    assert result["bytes"] == next(path.glob("*.gguf")).stat().st_size
    timed = command("bench", path, "--against", path, "--rounds", "1", "--prefill", "8", "--decode", "2")
    assert "llama.cpp" in timed.out


def test_what_runs_a_gguf_directory_is_named(plain, tokenizer, tmp_path, monkeypatch):
    export_gguf(plain("llama"), tmp_path / "out", tokenizer)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else find(name))
    with pytest.raises(InputError, match=r"pip install llama-cpp-python, or give the file the-model-F32\.gguf itself"):
        open_exported(tmp_path / "out")
