"""Graphs for engines: with their cache they compute what the model does, in 32 bits and fewer."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, MambaConfig

import tensorfold
from tensorfold import MPO, Kronecker, LowRank, Recipe, Rule
from tensorfold.errors import InputError, TensorfoldError
from tensorfold.export import graphs
from tensorfold.export.engine_model import EngineCache, engine_dtype, find_runnable, is_exported, open_exported
from tensorfold.export.graphs import export_onnx, export_openvino
from tensorfold.export.tracing import PACKAGES
from tensorfold.models.anatomy import count_parameters
from tensorfold.utils.torch_modes import multiplies_bfloat16

EXPORTS = {"onnx": export_onnx, "openvino": export_openvino}
MIXED = (
    Rule({"regex": "up_proj|c_fc"}, MPO(keep=0.5, sites=3)),
    Rule({"regex": "gate_proj|attn.c_attn"}, Kronecker(keep=0.5, scalars=True, permute="all")),
    Rule({"regex": "down_proj|c_proj"}, LowRank(keep=0.5)),
    Rule(["embedding"], LowRank(keep=0.5)),
)
CASES = {
    "tied llama, onnx": ("onnx", "llama", True),
    "untied gpt2, onnx": ("onnx", "gpt2", False),
    "tied llama, openvino": ("openvino", "llama", True),
}


def model_of(tiny, architecture, tied=True, rules=MIXED):
    blocks = {"gpt2": "n_layer"}.get(architecture, "num_hidden_layers")
    model = tiny(architecture, tied=tied, **{blocks: 1})
    for parameter in set(model.parameters()):
        if parameter.dim() == 2:
            parameter.data.mul_(6)
    tensorfold.fold(model, Recipe(rules))
    return model


@pytest.fixture(scope="module", params=CASES)
def written(request, tiny, tokenizer, tmp_path_factory):
    """(engine, model, report, directory), written once: tracing takes seconds."""
    to, architecture, tied = CASES[request.param]
    for package in PACKAGES[to]:
        pytest.importorskip(package)
    model = model_of(tiny, architecture, tied)
    path = tmp_path_factory.mktemp("graphs") / "out"
    return to, model, EXPORTS[to](model, path, tokenizer, name=architecture), path


@torch.no_grad()
def test_prompts_steps_and_padded_rows_are_the_models(written):
    _, model, report, path = written
    assert report.steps == 32
    assert report.same_tokens == "99 of 99"
    assert report.difference < 1e-4
    graph = open_exported(path)
    ids = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    first = graph(ids[:, :7], mask[:, :7])
    second = graph(ids[:, 7:], mask, past_key_values=first.past_key_values)  # two tokens at once
    got = torch.cat([first.logits, second.logits], 1)
    assert got.std() > 0.1
    torch.testing.assert_close(got[0, 4:], model(ids[:1, 4:]).logits[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(got[1], model(ids[1:]).logits[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("shared", [True, False], ids=["heads share keys", "own keys"])
def test_openvino_appends_to_its_cache_within_attention(tiny, tmp_path, shared):
    openvino = pytest.importorskip("openvino")
    model = tiny("llama", num_hidden_layers=2, head_dim=16, num_key_value_heads=2 if shared else 4)
    export_openvino(model, tmp_path / "out")
    compiled = openvino.Core().compile_model(tmp_path / "out" / "openvino_model.xml", "CPU")
    kinds = [str(each.get_rt_info()["layerType"].value) for each in compiled.get_runtime_model().get_ops()]
    assert kinds.count("ScaledDotProductAttention") == 2
    assert "Softmax" not in kinds  # attention in parts, which copies all keys and values at every token


@pytest.mark.parametrize("shared", [True, False], ids=["heads share keys", "own keys"])
def test_onnx_attention_appends_to_its_cache(tiny, tmp_path, shared):
    onnx = pytest.importorskip("onnx")
    model = tiny("llama", num_hidden_layers=2, num_key_value_heads=2 if shared else 4)
    export_onnx(model, tmp_path / "out")
    nodes = onnx.load(tmp_path / "out" / "model.onnx").graph.node
    attentions = [node for node in nodes if node.op_type == "Attention"]
    assert [list(node.input[4:]) for node in attentions] == [
        [f"past_key_values.{block}.key", f"past_key_values.{block}.value"] for block in range(2)
    ]
    assert [list(node.output[1:]) for node in attentions] == [
        [f"present.{block}.key", f"present.{block}.value"] for block in range(2)
    ]
    kinds = [node.op_type for node in nodes]
    assert (kinds.count("RotaryEmbedding"), kinds.count("RMSNormalization")) == (4, 5)
    assert kinds.count("Slice") == 1  # of the last tokens, before the head
    assert not {"Softmax", "Pow"} & set(kinds)


def test_onnx_attention_that_has_no_operation_is_left_in_parts(tmp_path):
    """Falcon's heads read one key together without being told to share it."""
    pytest.importorskip("onnx")
    config = AutoConfig.for_model(
        "falcon", vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, multi_query=True,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    report = export_onnx(AutoModelForCausalLM.from_config(config).eval(), tmp_path / "out")
    assert report.same_tokens == "99 of 99"


@pytest.mark.parametrize("to", EXPORTS)
@torch.no_grad()
def test_logits_of_the_last_tokens_alone(tiny, tmp_path, to):
    for package in PACKAGES[to]:
        pytest.importorskip(package)
    EXPORTS[to](tiny("llama", num_hidden_layers=1), tmp_path / "out", bits=8)
    graph = open_exported(tmp_path / "out")
    ids = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(2))
    whole = graph(ids).logits
    assert whole.shape == (2, 9, 300)
    for count in (1, 3, 9, 12):
        feed = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "num_logits_to_keep": torch.tensor([count])}
        feed["position_ids"] = torch.arange(9).expand(2, 9).contiguous()
        computed = graph._session(feed, EngineCache())
        assert computed.shape == (2, min(count, 9), 300)  # not computed and then left out
        torch.testing.assert_close(computed, whole[:, -count:], rtol=0, atol=1e-5)
        torch.testing.assert_close(graph(ids, logits_to_keep=count).logits, computed, rtol=0, atol=1e-5)


@torch.no_grad()
def test_logits_of_the_last_tokens_of_any_head(written):
    """A folded head may compute all of them."""
    *_, path = written
    graph, ids = open_exported(path), torch.arange(2, 9)[None]
    torch.testing.assert_close(graph(ids, logits_to_keep=2).logits, graph(ids).logits[:, -2:], rtol=0, atol=1e-5)


def test_it_generates_the_models_tokens(written):
    _, model, _, path = written
    ids = torch.tensor([[5, 7, 11]])
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    torch.testing.assert_close(open_exported(path).generate(ids, **settings), model.generate(ids, **settings))


def test_the_factors_are_kept_and_held_once(written):
    to, model, report, path = written
    held = sum(report.stored.values())
    assert report.parameters == count_parameters(model)
    # OpenVINO fills ranks up with zeros when it converts: the 14 numbers of a token are 16.
    assert 0.95 * report.parameters < held < {"onnx": 1.02, "openvino": 1.1}[to] * report.parameters + 128
    assert report.bytes > 4 * held
    assert not list(path.glob("*.safetensors"))
    assert "quantization_config" not in json.loads((path / "config.json").read_text(encoding="utf-8"))


def test_names_are_those_that_runtimes_read(written):
    to, _, _, path = written
    readme = (path / "README.md").read_text(encoding="utf-8")
    if to == "openvino":
        assert "beam_idx" in readme
        return
    import onnxruntime

    session = onnxruntime.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
    names = {value.name: value.shape for value in session.get_inputs()}
    assert {"input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value"} <= names.keys()
    assert names["input_ids"] == ["batch_size", "sequence_length"]
    assert [value.name for value in session.get_outputs()] == ["logits", "present.0.key", "present.0.value"]
    genai = json.loads((path / "genai_config.json").read_text(encoding="utf-8"))["model"]
    assert genai["decoder"]["inputs"].keys() >= names.keys() & {"input_ids", "attention_mask", "position_ids"}
    assert genai["decoder"]["num_key_value_heads"] == names["past_key_values.0.key"][1]
    for runtime in ("onnxruntime", "onnxruntime-genai", "transformers.js"):
        assert f"{runtime}\n" in readme


def test_the_readmes_code_runs(written):
    _, _, _, path = written
    readme = (path / "README.md").read_text(encoding="utf-8")
    code = readme.split("```python\n")[1].split("```")[0].replace("PATH", str(path))
    exec(code, {})


@pytest.mark.parametrize(("to", "bits"), [("onnx", 16), ("onnx", 8), ("onnx", 4), ("openvino", 8), ("openvino", 4)])
def test_fewer_bits(tiny, tmp_path, to, bits):
    for package in PACKAGES[to]:
        pytest.importorskip(package)
    model = model_of(tiny, "gpt2", rules=(Rule(["mlp"], LowRank(keep=0.7)),))
    report = EXPORTS[to](model, tmp_path / "out", bits=bits)
    assert report.difference < {16: 0.01, 8: 0.2, 4: 2}[bits]
    kind = {16: "float16", 8: "int8", 4: "int4"}[bits]
    assert report.stored[kind] > {16: 0.9, 8: 0.75, 4: 0.1}[bits] * report.parameters
    assert report.parameters * 0.95 < sum(report.stored.values()) < 1.2 * report.parameters + 128
    graph = open_exported(tmp_path / "out")
    assert graph.stored_type == f"{to} {kind}"
    assert f"{kind}" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@torch.no_grad()
def test_a_graph_computes_in_the_dtype_that_is_asked_for(tiny, tmp_path):
    for package in PACKAGES["openvino"]:
        pytest.importorskip(package)
    EXPORTS["openvino"](tiny("llama", num_hidden_layers=1), tmp_path / "out", bits=8)
    ids = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(2))
    source = find_runnable(str(tmp_path / "out"))
    exact, rounded = source.model()(ids).logits, source.model("bfloat16")(ids).logits
    assert rounded.dtype is torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.1 * exact.std().item())
    assert bool((rounded != exact).any()) is multiplies_bfloat16()  # others compute in float32 all the same
    torch.testing.assert_close(source.model(torch.float32)(ids).logits, exact, rtol=0, atol=0)
    assert source.model("bfloat16").stored_type == "openvino int8, computed in bfloat16"
    with pytest.raises(InputError, match="got the dtype float16, needed float32 or none, or bfloat16"):
        source.model("float16")


def test_onnx_computes_in_float32(tiny, tmp_path):
    for package in PACKAGES["onnx"]:
        pytest.importorskip(package)
    EXPORTS["onnx"](tiny("llama", num_hidden_layers=1), tmp_path / "out")
    with pytest.raises(InputError, match="got the dtype bfloat16, needed float32 or none: its weights"):
        find_runnable(str(tmp_path / "out")).model("bfloat16")
    assert engine_dtype("onnx") is torch.float32


def test_four_bits_are_fitted_to_a_text(tiny, tmp_path):
    for package in PACKAGES["openvino"]:
        pytest.importorskip(package)
    model = model_of(tiny, "gpt2", rules=(Rule(["mlp"], LowRank(keep=0.7)),))
    windows = torch.randint(20, 90, (4, 24), generator=torch.Generator().manual_seed(0))
    reports = [
        EXPORTS["openvino"](model, tmp_path / str(given is None), bits=4, windows=given) for given in (None, windows)
    ]
    files = [(tmp_path / name / "openvino_model.bin").read_bytes() for name in ("True", "False")]
    assert reports[0].stored == reports[1].stored
    assert files[0] != files[1]
    with pytest.raises(InputError, match="no effect in 8 bits"):
        EXPORTS["openvino"](model, tmp_path / "eight", bits=8, windows=windows)


def test_a_text_without_effect_is_refused(command, tmp_path):
    for options in (["--to", "onnx", "--bits", "4", "--calibrate", "self"], ["--to", "openvino", "--tokens", "9"]):
        assert command("export", "nowhere", *options, "--out", tmp_path / "out").status == 2


def test_a_directory_is_evaluated_sampled_and_timed(written, command, text_file):
    to, _, report, path = written
    judged = command("eval", path, "--text", text_file, "--protocol", "disjoint-64", "--max-tokens", "400", "--json")
    assert judged.status == 0, judged.err
    result = json.loads(judged.out)
    assert result["dtype"] == f"{to} float32"
    assert result["parameters"] == report.parameters
    assert result["bytes"] == report.bytes
    drawn = command("sample", path, "--prompt", "The", "--tokens", "5", "--temperature", "0", "--json")
    assert json.loads(drawn.out)["tokens"] == 5
    timed = command("bench", path, "--against", path, "--prefill", "8", "--decode", "3", "--rounds", "1", "--json")
    assert timed.status == 0, timed.err
    assert json.loads(timed.out)["bytes"]["model"] == report.bytes
    assert command("eval", path, "--text", text_file, "--dtype", "bfloat16").status == 2
    assert is_exported(path)


def test_what_keeps_no_keys_and_values_says_so(tmp_path):
    pytest.importorskip("onnxscript")
    config = MambaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(InputError, match="keys and values"):
        export_onnx(AutoModelForCausalLM.from_config(config).eval(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("export", [export_onnx, export_openvino])
def test_folded_experts_say_what_to_do(tiny, tmp_path, export):
    for package in (*PACKAGES["onnx"], *PACKAGES["openvino"]):
        pytest.importorskip(package)
    model = tiny("qwen3_moe")
    tensorfold.fold(model, Recipe((Rule("experts", LowRank(rank=4)),)))
    with pytest.raises(InputError, match=r"mlp\.experts\.gate_up_proj is folded.*Take --to dense"):
        export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_differs_is_not_kept(tiny, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    model = model_of(tiny, "gpt2")

    def damaged(model, to):
        norm = model.transformer.ln_f
        own, norm.weight = norm.weight, torch.nn.Parameter(1.01 * norm.weight.detach())
        program = trace(model, to)
        norm.weight = own
        return program

    trace = graphs.trace
    monkeypatch.setattr(graphs, "trace", damaged)
    with pytest.raises(TensorfoldError, match="differ from the model's"):
        export_onnx(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_directories_are_refused(written, command, tmp_path):
    to, _, _, path = written
    (tmp_path / "engine.json").write_text('{"engine": "abacus"}')
    assert "export again" in command("sample", tmp_path).err
    (tmp_path / "engine.json").write_text((path / "engine.json").read_text())
    AutoConfig.from_pretrained(path).save_pretrained(tmp_path)
    outcome = command("sample", tmp_path)
    assert outcome.status == 2
    assert to in outcome.err


def test_bits_are_for_graphs(refused, dense_directory, tmp_path):
    refused("export", dense_directory, "--to", "dense", "--bits", "8", "--out", tmp_path / "out", says=["--bits"])
    with pytest.raises(InputError, match="bits=3"):
        export_onnx(None, tmp_path / "out", bits=3)
