"""``bench``: what it measures, in which order, and what it refuses. No test looks at how long anything takes."""

import json
import subprocess

import pytest
import torch
from torch import nn

import tensorfold
from bench_tools import QUICK, Clock, fold
from market import MARKET
from tensorfold import LowRank, Recipe, Rule, Spec, TokenMPS
from tensorfold.algebra.contraction.search import fastest_path
from tensorfold.benchmark import memory, rivals
from tensorfold.benchmark.layers import _dense, bench_layer, groups
from tensorfold.benchmark.run import bench
from tensorfold.benchmark.timing import Spread, Timing, in_turn, interleave
from tensorfold.benchmark.whole import macs, model_macs, prompt, prompt_length, size
from tensorfold.errors import InputError
from tensorfold.nn import FoldedModule, MPOEmbedding, MPOLinear, cache_matrices


@pytest.fixture
def no_rivals(monkeypatch):
    monkeypatch.setattr(rivals, "RIVALS", ())


@pytest.fixture
def folded(tiny):
    return fold(tiny("llama"))


@pytest.fixture
def report(folded, no_rivals):
    return bench(folded, clock=Clock(), **QUICK)


def test_quartiles_of_samples():
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)
    assert Spread.of([1.0, 2.0]) == Spread(1.5, 1.25, 1.75)


def test_every_round_has_one_sample_of_each():
    order = list(in_turn("abc", 4))
    assert [sorted(order[k : k + 3]) for k in range(0, 12, 3)] == [["a", "b", "c"]] * 4
    assert [order[k] for k in range(0, 12, 3)] == ["a", "b", "c", "a"]


def test_runs_are_interleaved_after_a_warm_up():
    done = []
    calls = {name: lambda name=name: done.append(name) for name in ("model", "dense", "other")}
    samples = interleave(calls, 3, Clock(), lambda: None)
    assert done[:6] == ["model", "model", "dense", "dense", "other", "other"]
    assert done[6:] == ["model", "dense", "other", "dense", "other", "model", "other", "model", "dense"]
    assert samples == {name: [1.0] * 3 for name in calls}


def test_short_calls_are_repeated_within_a_sample():
    clock = Clock()
    count = 0

    def call():
        nonlocal count
        count += 1

    samples = interleave({"model": call}, 2, lambda: clock() * 1e-3, lambda: None)
    assert count == 2 + 2 * 5
    assert samples["model"] == pytest.approx([2e-4, 2e-4])


def test_an_accelerator_is_waited_for_on_both_sides_of_a_sample():
    events = []

    def clock():
        events.append("clock")
        return float(len(events))

    interleave({"model": lambda: events.append("call")}, 1, clock, lambda: events.append("wait"))
    assert events[-5:] == ["wait", "clock", "call", "wait", "clock"]


def test_ratios_are_of_the_same_round():
    timing = Timing(6, {"model": [1.0, 10.0, 2.0], "dense": [2.0, 30.0, 3.0]}, {})
    assert timing.speedup == {"dense": Spread.of([2.0, 3.0, 1.5])}
    assert timing.tokens_per_second == {"model": 3.0, "dense": 2.0}


def test_the_report_has_all_that_was_asked_for(report, folded):
    result = json.loads(json.dumps(report.to_dict()))
    assert set(result) == {
        "model", "against", "machine", "cores", "device", "torch", "threads", "dtype", "rounds", "way", "layers",
        "prefill", "decode", "parameters", "bytes", "peak_bytes", "notes",
    }  # fmt: skip
    assert (result["torch"], result["threads"], result["dtype"]) == (torch.__version__, 1, "float32")
    assert result["machine"]
    forms = {"model", "dense", "materialised"}
    for whole, tokens in ((result["prefill"], 8), (result["decode"], 2)):
        assert whole["tokens"] == tokens
        assert set(whole["seconds"]) == set(whole["tokens_per_second"]) == set(whole["macs"]) == forms
        assert set(whole["speedup"]) == forms - {"model"}
        assert all(spread[key] > 0 for spread in whole["speedup"].values() for key in ("median", "q1", "q3"))
    assert result["parameters"] == {"model": folded.num_parameters(), "dense": 25_120}
    assert result["bytes"]["model"] >= 4 * folded.num_parameters()
    assert result["peak_bytes"] is None
    for layer in result["layers"]:
        assert [point["tokens"] for point in layer["tokens"]] == [1, 3]
        for point in layer["tokens"]:
            assert all(spread["median"] > 0 for spread in point["speedup"].values())
            table = layer["kind"] == "MPOEmbedding"
            assert set(point["speedup"]) == ({"dense"} if table else {"dense", "materialised"})


def test_layers_of_equal_spec_are_timed_once(report, folded):
    counts = {tuple(layer.names): layer.kind for layer in report.layers}
    names = [name for group in counts for name in group]
    assert sorted(names) == sorted(n for n, m in folded.named_modules() if isinstance(m, FoldedModule))
    mlp = next(layer for layer in report.layers if "model.layers.0.mlp.up_proj" in layer.names)
    assert mlp.names == [f"model.layers.{k}.mlp.{part}_proj" for k in (0, 1) for part in ("gate", "up")]
    assert mlp.to_dict()["count"] == 4
    assert len(report.layers) == 5


def test_only_the_first_of_equal_layers_is_run_by_itself(folded, no_rivals):
    calls = []
    layers = {name: m for name, m in folded.named_modules() if name.endswith(("up_proj", "gate_proj"))}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: calls.append(name))
    [group] = [group for group in groups(folded, None) if group.names[0] in layers]
    bench_layer(group, (2,), 1, Clock(), [], False, lambda: None)
    assert set(calls) == {"model.layers.0.mlp.gate_proj"}


def test_the_chosen_way_is_shown_and_can_be_overridden(folded, no_rivals):
    spec = Spec.from_modes((8, 8), (8, 8), 16)
    layer = MPOLinear(spec)
    assert str(layer.chosen(1)) != str(layer.chosen(4096)) == "materialise"
    [group] = groups(nn.Sequential(layer), None)
    measured, _ = bench_layer(group, (1, 4096), 1, Clock(), [], False, lambda: None)
    assert [point.way for point in measured.points] == [str(layer.chosen(1)), "materialise"]

    seen = []
    q_proj = folded.model.layers[0].self_attn.q_proj
    q_proj.register_forward_pre_hook(lambda module, _: seen.append(module.way))
    q_proj.way = "materialise"
    result = bench(folded, clock=Clock(), **QUICK, way="chain").to_dict()
    assert result["way"] == "chain"
    [shown] = [layer for layer in result["layers"] if layer["names"][0].endswith("q_proj")]
    expected = {str(fastest_path(q_proj.spec, tokens, force="chain")) for tokens in (1, 3)}
    assert {point["way"] for point in shown["tokens"]} == expected != {"materialise"}
    # As the model itself it takes the chain; as the materialised form, in whole models, its matrix.
    assert set(seen) == {"chain", "materialise"}
    assert q_proj.way == "materialise"


def test_the_materialised_form_builds_every_matrix_in_every_forward(folded, no_rivals):
    report = bench(folded, clock=Clock(), **QUICK)
    linear = [layer for layer in report.layers if layer.kind == "MPOLinear"]
    for layer in linear:
        for point in layer.points:
            built = MPOLinear(layer.spec)
            built.way = "materialise"
            tokens = point.timing.tokens
            assert point.timing.macs["materialised"] == macs(built, tokens) > layer.spec.dense_parameters


def test_the_model_is_left_as_it_was(folded, no_rivals):
    before = {name: tensor.clone() for name, tensor in folded.state_dict().items()}
    folded.train()
    bench(folded, clock=Clock(), **QUICK, way="materialise", threads=1)
    assert all(module.training for module in folded.modules())
    assert all(module.way is None for module in folded.modules() if isinstance(module, MPOLinear))
    after = folded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_whole_models_are_taken_in_turn(folded, tiny, no_rivals):
    dense, done = tiny("llama"), []
    folded.register_forward_pre_hook(
        lambda m, _, kw: done.append((m.model.layers[0].self_attn.q_proj.way or "model", kw["input_ids"].shape[1])),
        with_kwargs=True,
    )
    dense.register_forward_pre_hook(lambda m, _, kw: done.append(("dense", kw["input_ids"].shape[1])), with_kwargs=True)
    bench(folded, dense, clock=Clock(), **QUICK)
    prompts = [name for name, length in done if length == 8]
    assert prompts[:3] == ["model", "dense", "materialise"]  # the warm-up
    assert prompts[3:] == ["model", "dense", "materialise", "dense", "materialise", "model"]
    assert [length for _, length in done[-3:]] == [8, 1, 1]


def test_decode_goes_on_from_the_cache(folded, no_rivals):
    """Logits of the last decoded token are those of one pass over all of them."""
    logits = []
    folded.register_forward_hook(lambda *call: logits.append(call[-1].logits))
    bench(folded, clock=Clock(), **QUICK)
    with torch.no_grad():
        expected = folded(input_ids=prompt([folded], 10)).logits[:, -1:]
    torch.testing.assert_close(logits[-2], expected, rtol=1e-4, atol=1e-5)


def test_against_a_dense_model_layers_of_the_same_name_are_compared(tiny, no_rivals):
    dense, folded = tiny("gpt2"), tiny("gpt2")
    tensorfold.fold(folded, Recipe((Rule("mlp", LowRank(rank=4)),)))
    found = groups(folded, dense)
    assert found[0].beside is dense.transformer.h[0].mlp.c_fc
    report = bench(folded, dense, clock=Clock(), **QUICK)
    assert {layer.dense for layer in report.layers} == {"Conv1D of the dense model"}
    assert report.parameters["dense"] == dense.num_parameters()
    # Another model's layers of the same name, but not of the same shape, do other work.
    assert {group.beside for group in groups(folded, tiny("llama"))} == {None}
    wider = nn.Sequential(nn.Linear(32, 64))
    assert groups(nn.Sequential(MPOLinear(Spec.low_rank(48, 32, 2))), wider)[0].beside is None


@pytest.mark.parametrize("name", MARKET)
def test_the_dense_layer_computes_what_the_folded_one_does(name):
    layer = MPOLinear(MARKET[name])
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(_dense(layer)(x), layer(x), rtol=1e-4, atol=1e-5)


def test_tables_are_compared_with_an_embedding(tiny, no_rivals):
    model = tiny("gemma3")
    tensorfold.fold(model, Recipe((Rule("embedding", TokenMPS(modes=(2, 4, 4), rank=2)),)))
    table = model.get_input_embeddings()
    ids = torch.arange(9)
    dense = _dense(table)
    assert isinstance(dense, nn.Embedding)
    torch.testing.assert_close(dense(ids), table(ids))
    report = bench(model, clock=Clock(), **QUICK)
    assert {layer.kind: layer.dense for layer in report.layers} == {
        "TokenMPSEmbedding": "nn.Embedding", "TokenMPSHead": "nn.Linear",
    }  # fmt: skip
    assert {point.way for layer in report.layers for point in layer.points} == {"own"}
    assert set(report.prefill.samples) == {"model", "dense"}  # no matrix is multiplied out in any forward


def test_a_model_that_is_not_folded_is_timed_alone(tiny):
    report = bench(tiny("gpt2"), clock=Clock(), **{key: value for key, value in QUICK.items() if key != "tokens"})
    assert set(report.prefill.samples) == {"model"}
    assert report.layers == []
    assert "not folded" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["prefill"]["speedup"] == {}


def test_multiply_adds_of_models(tiny, folded):
    dense = tiny("llama")
    linear = sum(p.numel() for n, p in dense.named_parameters() if "norm" not in n)
    assert model_macs(dense, 5) == linear  # the tied table is the head's
    head = folded.lm_head
    assert macs(head, 1) == head.chosen(1).macs + head.chosen(1).build
    assert macs(MPOEmbedding(Spec.low_rank(300, 16, 4)), 7) == 4 * 16
    built = MPOLinear(Spec.from_modes((8, 8), (8, 8), 16))
    built.way = "materialise"
    way = built.chosen(64)
    assert macs(built, 64) == way.macs + way.build / 64
    assert size(folded.model.embed_tokens) == 4 * 8 * 332


def test_multiply_adds_of_a_held_matrix_are_the_dense_layers():
    layer = MPOLinear(Spec.from_modes((8, 8), (8, 8), 16))
    assert cache_matrices(layer, 1)
    assert macs(layer, 1) == 64 * 64
    assert layer.way_taken(1) == "held matrix"


def test_the_prompt_fits_the_context(tiny):
    model = tiny("llama")
    assert prompt_length([model], None, 28) == 100
    assert prompt_length([model], 100, 28) == 100
    with pytest.raises(InputError, match="at most 96"):
        prompt_length([model], 100, 32)
    with pytest.raises(InputError, match="fewer than 128"):
        prompt_length([model], None, 128)
    assert prompt_length([tiny("llama", max_position_embeddings=4096)], None, 32) == 512


def test_a_model_without_a_cache_is_not_decoded(folded, no_rivals):
    def without(_module, _args, out):
        out.past_key_values = None
        return out

    folded.register_forward_hook(without)
    report = bench(folded, clock=Clock(), **QUICK)
    assert report.decode is None
    assert any(note.startswith("decode: ") for note in report.notes)
    assert "generating" not in str(report)


def test_outputs_beyond_reason_are_left_out_and_named(no_rivals):
    layer = MPOLinear(Spec.low_rank(2**18, 2, 1), bias=False)
    [group] = groups(nn.Sequential(layer), None)
    measured, notes = bench_layer(group, (1, 4096), 1, Clock(), [], False, lambda: None)
    assert [point.timing.tokens for point in measured.points] == [1]
    assert "1,073,741,824 outputs: left out" in notes[0]


def test_peak_of_a_forward_is_what_the_allocator_gave():
    x = torch.zeros(1000, 100)

    def call():
        y = x + 1  # 400,000 bytes, and as many for each of the next two; the first is gone by the third
        z = y + 1
        del y
        return z + 1

    with torch.no_grad():
        assert 800_000 <= memory.peak_of_call(call, torch.device("cpu")) < 810_000


def test_layers_say_what_a_forward_allocates(no_rivals):
    layer = MPOLinear(Spec.low_rank(64, 32, 4))
    [group] = groups(nn.Sequential(layer), None)
    measured, _ = bench_layer(group, (100,), 1, Clock(), [], True, lambda: None)
    peaks = measured.points[0].peak_bytes
    assert set(peaks) == {"model", "dense", "materialised"}
    outputs = 100 * 64 * 4
    assert outputs <= peaks["dense"] < peaks["materialised"]
    assert outputs + 100 * 4 * 4 <= peaks["model"] < 3 * outputs


def test_a_measuring_process_that_fails_is_noted(folded, tmp_path, monkeypatch, no_rivals):
    folded.save_pretrained(tmp_path / "folded")

    def failing(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nMemoryError: no more\n")

    monkeypatch.setattr(subprocess, "run", failing)
    report = bench(tmp_path / "folded", clock=Clock(), **{**QUICK, "memory": True})
    assert report.peak_bytes is None
    assert "peak memory of dense: the process that measures it failed: MemoryError: no more" in report.notes


def test_peaks_of_models_in_memory_are_not_measured(folded, no_rivals):
    report = bench(folded, clock=Clock(), **{**QUICK, "memory": True})
    assert report.peak_bytes is None
    assert any(note.startswith("peak memory of model: measured of models on disk only") for note in report.notes)
    assert all(point.peak_bytes["model"] > 0 for layer in report.layers for point in layer.points)


def test_models_that_cannot_be_compared_are_refused(folded, tiny):
    for arguments, options, says in (
        ((folded, folded), {}, "compared with itself"),
        ((folded, tiny("llama").to(torch.bfloat16)), {}, "dtype float32.*has bfloat16"),
        ((folded,), {"dtype": "bfloat16"}, "convert it"),
        ((nn.Linear(2, 2),), {}, "got Linear"),
        ((folded,), {"round": 3}, "did you mean 'rounds'"),
        ((folded,), {"way": "fastest"}, "way='fastest'"),
        ((folded,), {"tokens": ()}, "tokens"),
    ):
        with pytest.raises(InputError, match=says):
            bench(*arguments, **options)


def test_it_is_a_public_function_and_no_module_hides_it():
    assert tensorfold.bench is bench
    assert "bench" in tensorfold.__all__
