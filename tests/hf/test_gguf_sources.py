"""A GGUF file: its header gives the configuration, and it is converted only for its weights or its tokenizer."""

import json
from pathlib import Path

import pytest
import torch

from tensorfold.errors import InputError, is_out_of_memory
from tensorfold.hf import sources
from tensorfold.hf.sources import find_model

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

HALF = ("--keep", "0.5", "--targets", "mlp,embedding")
ROWS = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
        "up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip


@pytest.fixture
def llama_file(tiny, tokenizer, tmp_path):
    """``llama_file(tied)``: the tiny Llama in float32 as llama.cpp stores it, with its tokenizer."""

    def write(tied=True):
        path, model = tmp_path / "tiny.gguf", tiny("llama", tied=tied)
        config, writer = model.config, gguf.GGUFWriter(path, "llama")
        writer.add_name("tiny")
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
        writer.add_rope_freq_base(10000.0)
        writer.add_vocab_size(config.vocab_size)
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        tokens = [token for token, _ in vocabulary]
        tokens += [f"<unused{k}>" for k in range(config.vocab_size - len(tokens))]
        merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_types([1] * len(tokens))
        writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_tensor("token_embd.weight", model.model.embed_tokens.weight.detach().numpy())
        writer.add_tensor("output_norm.weight", model.model.norm.weight.detach().numpy())
        if not tied:
            writer.add_tensor("output.weight", model.lm_head.weight.detach().numpy())
        for number, block in enumerate(model.model.layers):
            for name, module in block.named_modules():
                if (key := ROWS.get(name.rpartition(".")[2])) is not None:
                    writer.add_tensor(f"blk.{number}.{key}.weight", module.weight.detach().numpy())
            writer.add_tensor(f"blk.{number}.attn_norm.weight", block.input_layernorm.weight.detach().numpy())
            writer.add_tensor(f"blk.{number}.ffn_norm.weight", block.post_attention_layernorm.weight.detach().numpy())
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()
        return path

    return write


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [HALF, ("--shapes",), ("--recipe", "low-rank-80")], ids=" ".join)
def test_planning_reads_the_header_alone_and_plans_the_same(command, llama_file, monkeypatch, tied, options):
    path = llama_file(tied)
    with monkeypatch.context() as patched:
        for reader in ("AutoModelForCausalLM", "AutoTokenizer"):
            patched.setattr(getattr(sources, reader), "from_pretrained", None)
        patched.setattr(sources, "converted", None)
        planned = command("plan", path, *options, "--json")
    assert planned.status == 0, planned.err
    assert command("plan", find_model(str(path)).path, *options, "--json").out == planned.out


def test_the_header_gives_the_configuration_that_the_conversion_writes(llama_file):
    source = find_model(str(llama_file()))
    config, written = source.config(), source.model().config
    differing = {"architectures", "_name_or_path", "transformers_version"}
    for key in (config.to_dict().keys() | written.to_dict().keys()) - differing:
        assert config.to_dict().get(key) == written.to_dict().get(key), key


def test_the_conversion_is_made_once_and_holds_the_weights(llama_file, tiny, monkeypatch):
    path = llama_file()
    model = find_model(str(path)).model()
    assert torch.equal(model.model.embed_tokens.weight, tiny("llama").model.embed_tokens.weight)
    monkeypatch.setattr(sources.AutoModelForCausalLM, "from_pretrained", None)
    assert find_model(str(path)).path == model.name_or_path


def test_sizes_that_no_file_has_are_damage_and_no_want_of_memory():
    """A reader that runs out of memory over them, and then says that shapes differ, has met a damaged file."""

    def read():
        with sources._reading(Path("own.gguf")):
            try:
                raise MemoryError
            except MemoryError:
                raise RuntimeError("You set `ignore_mismatched_sizes` to `False`, thus raising an error.")  # noqa: B904

    with pytest.raises(InputError, match="other shapes than it says") as refused:
        read()
    assert not is_out_of_memory(refused.value)
