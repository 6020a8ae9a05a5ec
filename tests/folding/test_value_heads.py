"""Smaller value heads: the basis of the heads, their budget, and whole folds."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma4TextConfig

import tensorfold
from tensorfold import Auto
from tensorfold.algebra.allocation import Curve, joint_curve, least
from tensorfold.algebra.solvers.low_rank import error_curve
from tensorfold.algebra.solvers.smaller_heads import HeadBasis, Known, shrunken_heads
from tensorfold.calibration.block_stream import BlockStream
from tensorfold.export.checkpoints import export_dense, export_onnx
from tensorfold.export.tracing import PACKAGES
from tensorfold.folding import rank_search as search
from tensorfold.folding.value_heads import free, value_heads
from tensorfold.hf.surgery import split_linear
from tensorfold.methods import auto
from tensorfold.models.anatomy import by_block, matrices

HEADS, GROUPS, WHOLE, WIDTH = 6, 3, 8, 20


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size, seed):
    x = random(3 * size, size, seed=seed) * torch.logspace(0, -1, size, dtype=torch.float64)
    return x.T @ x


def attention():
    values = Known(random(GROUPS * WHOLE, WIDTH), moment(WIDTH, 1), moment(GROUPS * WHOLE, 2))
    outputs = Known(random(WIDTH, HEADS * WHOLE, seed=3), moment(HEADS * WHOLE, 4), moment(WIDTH, 5))
    return values, outputs


# ── the basis ──


def test_curves_are_the_errors_of_matrices_with_smaller_heads():
    values, outputs = attention()
    for basis, of_values, of_outputs in shrunken_heads(values, outputs, HEADS):
        size = basis.size
        assert 0 < size < WHOLE
        torch.testing.assert_close(basis.into @ basis.into.mT, torch.eye(size).to(basis.into).expand(GROUPS, -1, -1))
        rows = basis.rows(values.weight).reshape(GROUPS, WHOLE, -1)
        assert not rows[:, size:].any()
        assert rows[:, :size].any(-1).all()
        # O' by an independent regression, on inputs with just the second moment C
        root = torch.linalg.cholesky(outputs.input_moment)
        each = basis.into.double().repeat_interleave(HEADS // GROUPS, 0)
        seen = torch.block_diag(*each) @ root
        best = torch.linalg.lstsq(seen.T, (outputs.weight @ root).T).solution.T
        lack = outputs.weight @ root - best @ seen
        lost = torch.einsum("oi,op,pi->", lack, outputs.gradient_moment, lack)
        assert of_outputs[-1].item() == pytest.approx(lost.item(), rel=1e-4)
        assert of_outputs[0].item() == pytest.approx(error_curve(*outputs)[0].item(), rel=1e-4)
        assert of_values[-1] == 0
        assert len(of_values) == GROUPS * size + 1 or len(of_values) == WIDTH + 1


def test_what_heads_do_not_use_is_lost_for_nothing():
    values, outputs = attention()
    used = [torch.linalg.qr(random(WHOLE, 5, seed=seed)).Q for seed in range(GROUPS)]
    projections = torch.stack([q @ q.T for q in used]).repeat_interleave(HEADS // GROUPS, 0)
    weight = torch.einsum("ohx,hxy->ohy", outputs.weight.reshape(WIDTH, HEADS, WHOLE), projections).flatten(1)
    losses = {
        curves.basis.size: float(curves.outputs[-1] / curves.outputs[0])
        for curves in shrunken_heads(values, outputs._replace(weight=weight), HEADS)
    }
    assert losses[5] < 1e-5 < 1e-3 < losses[4]


def test_a_turn_and_back_leaves_what_the_heads_make():
    values, outputs = attention()
    found = list(shrunken_heads(values, outputs, HEADS))[-1].basis
    basis = HeadBasis(found.into.double(), found.back.double())
    x = random(7, GROUPS * WHOLE)
    turned = basis.rows(x.T).T
    repeated = turned.reshape(7, GROUPS, 1, WHOLE).expand(-1, -1, HEADS // GROUPS, -1).reshape(7, -1)
    direct = torch.einsum("gws,ngs->ngw", basis.back, turned.reshape(7, GROUPS, WHOLE)[..., : basis.size])
    direct = direct[:, :, None].expand(-1, -1, HEADS // GROUPS, -1).reshape(7, -1)
    torch.testing.assert_close(repeated @ basis.columns(outputs.weight).T, direct @ outputs.weight.T)
    # gradients at E W x, where W x enters as back E W x
    given = random(50, GROUPS * WHOLE, seed=9)
    back = torch.block_diag(*[torch.nn.functional.pad(each, (0, WHOLE - basis.size)) for each in basis.back])
    torch.testing.assert_close(basis.gradient_moment(given.T @ given), (given @ back).T @ (given @ back))


# ── one budget ──


def curve(seed, choices):
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(choices, generator=generator, dtype=torch.float64).sort(descending=True).values
    return Curve(losses, torch.randint(1, 9, (choices,), generator=generator).cumsum(0).double())


@pytest.mark.parametrize("seed", range(10))
def test_the_joint_curve_has_what_every_price_asks_for(seed):
    by_size = {size: (curve(seed + size, 5), curve(seed + size + 100, 7)) for size in (8, 6, 4)}
    joint, points = joint_curve(by_size)
    assert (joint.costs.diff() > 0).all()
    assert (joint.losses.diff() < 0).all()
    for (size, (i, j)), cost, loss in zip(points, joint.costs, joint.losses, strict=True):
        values, outputs = by_size[size]
        assert cost == values.costs[i] + outputs.costs[j]
        assert loss == values.losses[i] + outputs.losses[j]
    everything = [
        (values.losses[i] + outputs.losses[j], values.costs[i] + outputs.costs[j])
        for values, outputs in by_size.values()
        for i, j in itertools.product(range(5), range(7))
    ]
    for price in torch.logspace(-4, 1, 30):
        wanted = min(float(loss + price * cost) for loss, cost in everything)
        assert float((joint.losses + price * joint.costs).min()) == pytest.approx(wanted)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("floors", [(0, 0), (9, 14), (1e9, 0), (1e9, 1e9)])
def test_the_joint_curve_keeps_above_both_floors_and_begins_at_them(seed, floors):
    by_size = {
        size: tuple(replace(curve(seed + size + k, 9), floor=floor) for k, floor in enumerate(floors))
        for size in (8, 6, 4)
    }
    joint, points = joint_curve(by_size)
    for size, indices in points:
        for each, index in zip(by_size[size], indices, strict=True):
            assert each.costs[index] >= min(each.floor, each.costs[-1])
    values, outputs = by_size[8]
    assert joint.costs[0] <= least({"values": values, "outputs": outputs})
    assert joint.losses[-1] <= values.losses[-1] + outputs.losses[-1]


def test_the_joint_curve_has_the_steps_between_the_corners():
    """Whose losses fall by more from step to step, so that no price asks for any but the ends."""
    steps = torch.arange(30, dtype=torch.float64)
    concave, convex = Curve(900 - steps**2, steps), Curve((29 - steps) ** 2, steps)
    joint, _ = joint_curve({8: (concave, convex)})
    assert joint.costs.tolist() == list(range(59))


# ── models ──


def gemma4():
    torch.manual_seed(0)
    settings = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    config = Gemma4TextConfig(
        num_hidden_layers=2, vocab_size=300, head_dim=64, global_head_dim=64, num_kv_shared_layers=0,
        vocab_size_per_layer_input=300, hidden_size_per_layer_input=8, **settings,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def found(model, tokenizer, prose):
    ids = torch.tensor(tokenizer(prose)["input_ids"][:128]).reshape(2, 64)
    with torch.no_grad():
        stream = BlockStream(model, ids)
        return value_heads(stream, 0, by_block(matrices(model), stream.name)[0])


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("llama", ("self_attn.v_proj", "self_attn.o_proj")),
        ("qwen2", ("self_attn.v_proj", "self_attn.o_proj")),
        ("gemma3", ("self_attn.v_proj", "self_attn.o_proj")),  # its output goes through a norm
        ("opt", ("self_attn.v_proj", "self_attn.out_proj")),
        ("phi", ("self_attn.v_proj", "self_attn.dense")),
        ("gpt2", None),
        ("gpt_neox", None),
        ("gemma4", None),  # a norm without scales behind the values
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_outputs_are_found_by_what_they_do(tiny, tokenizer, prose, architecture, names, dtype):
    model = gemma4() if architecture == "gemma4" else tiny(architecture)
    pair = found(model.to(dtype), tokenizer, prose)
    if names is None:  # query, key and value are one matrix
        assert pair is None
    else:
        assert (
            tuple(m.name.split(".", 3 if architecture != "opt" else 4)[-1] for m in (pair.values, pair.outputs))
            == names
        )
        assert (pair.heads, pair.whole) == (4, 8)
        assert pair.groups == pair.values.out_features // 8


def test_a_fused_matrix_has_them_once_it_is_split(tiny, tokenizer, prose):
    model = tiny("gpt2")
    split_linear(model, "transformer.h.0.attn.c_attn", 3)
    assert found(model, tokenizer, prose).values.name == "transformer.h.0.attn.c_attn.2"


def test_values_that_a_later_block_reads_are_not_free(tiny, tokenizer, prose):
    model = tiny("llama", num_hidden_layers=3)
    ids = torch.tensor(tokenizer(prose)["input_ids"][:128]).reshape(2, 64)
    shared, later = model.model.layers[0].self_attn.v_proj, model.model.layers[2]
    later.mlp.register_forward_hook(lambda _, args, output: output + shared(args[0]).repeat(1, 1, 2))
    with torch.no_grad():
        stream = BlockStream(model, ids)
        pairs = []
        for index, batch in by_block(matrices(model), stream.name).items():
            stream.advance_to(index)
            pairs.append(value_heads(stream, index, batch))
    assert free(model, ids[:1], pairs) == pairs[1:]
    assert free(tiny("llama", num_hidden_layers=3), ids[:1], []) == []


def with_idle_dimensions(model, used):
    """Value heads whose outputs look at ``used`` of their dimensions, in a random basis."""
    for layer in model.model.layers:
        attention = layer.self_attn
        groups = attention.v_proj.out_features // 8
        q = torch.linalg.qr(torch.randn(groups, 8, used, generator=torch.Generator().manual_seed(5))).Q
        projections = (q @ q.mT).repeat_interleave(4 // groups, 0)
        weight = attention.o_proj.weight.data
        attention.o_proj.weight.data = torch.einsum(
            "ohx,hxy->ohy", weight.reshape(len(weight), 4, 8), projections
        ).flatten(1)
    return model


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_heads_shrink_where_they_are_not_used(tiny, tokenizer, prose, architecture, tmp_path, monkeypatch):
    dense = with_idle_dimensions(tiny(architecture), 4)
    for layer in dense.model.layers:  # as made, attention adds next to nothing
        layer.self_attn.v_proj.weight.data *= 10
        layer.self_attn.o_proj.weight.data *= 10
        if architecture == "qwen2":
            torch.nn.init.normal_(layer.self_attn.v_proj.bias)
    ids = torch.tensor(tokenizer(prose)["input_ids"][:512]).reshape(4, 128)
    targets, distances = ["v_proj", "o_proj"], []
    recipe = tensorfold.Recipe(fold=(tensorfold.Rule(targets, Auto(keep=0.4)),))
    medium = replace(auto.EFFORTS["medium"], shrink=0.0)  # so that what is not used is not asked for
    for effort in (medium, replace(medium, heads=False)):
        monkeypatch.setitem(auto.EFFORTS, "medium", effort)
        model = copy.deepcopy(dense)
        report = tensorfold.fold(model, recipe, tokenizer, [prose], calibration_tokens=2048)
        with torch.no_grad():
            distances.append(float((model(ids).logits - dense(ids).logits).square().mean()))
        kept = {name: (choice.rows, choice.columns) for name, choice in report.choices.items()}
        assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
        if effort.heads:
            groups = dense.model.layers[0].self_attn.v_proj.out_features // 8
            assert set(kept.values()) == {(4 * groups, 0), (0, 16)}
            for choice in report.choices.values():
                error = dict(choice.curve)[choice.parameters]
                assert error < 0.01 < max(choice.rivals.values())  # heads of fewer dimensions than are used
                assert len(choice.rivals) == 5  # of 8, 7, 6, 5 and 3 dimensions
            model.save_pretrained(tmp_path / "folded")
            assert torch.equal(tensorfold.load(tmp_path / "folded").eval()(ids).logits, model(ids).logits)
        else:
            assert set(kept.values()) == {(0, 0)}
    assert distances[0] < 0.01 * distances[1]


@pytest.mark.parametrize("to", ["dense", "int8", "onnx"])
def test_smaller_heads_can_be_exported(tiny, tokenizer, prose, to, tmp_path):
    model = with_idle_dimensions(tiny("llama", num_hidden_layers=1), 4)
    recipe = tensorfold.Recipe(fold=(tensorfold.Rule("attention", Auto(keep=0.4)),))
    report = tensorfold.fold(model, recipe, tokenizer, [prose], calibration_tokens=1024)
    assert any(choice.rows for choice in report.choices.values())
    ids = torch.tensor(tokenizer(prose)["input_ids"][:64])[None]
    with torch.no_grad():
        expected = model(ids).logits
    if to == "onnx":
        for package in PACKAGES["onnx"]:
            pytest.importorskip(package)
        assert export_onnx(model, tmp_path / "out").difference < 1e-5
    elif to == "dense":
        export_dense(model, tmp_path / "out")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(plain(ids).logits, expected, rtol=0, atol=1e-5)
    else:
        tensorfold.quantize(model)
        model.save_pretrained(tmp_path / "out")
        loaded = tensorfold.load(tmp_path / "out").eval()
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert float((loaded(ids).logits.detach() - expected).norm() / expected.norm()) < 0.02


def test_an_interrupted_fold_keeps_the_bases(tiny, tokenizer, prose, tmp_path, monkeypatch):
    recipe = tensorfold.Recipe(fold=(tensorfold.Rule("attention", Auto(keep=0.5)),))
    given = {"calibration": [prose], "calibration_tokens": 1024}

    def folded(**more):
        model = with_idle_dimensions(tiny("llama"), 4)
        return model, tensorfold.fold(model, recipe, tokenizer, **given, **more)

    whole, report = folded()
    assert any(choice.rows for choice in report.choices.values())
    real = tensorfold.folding.in_memory.swap

    def dies(model, matrix, module):
        if "layers.1" in matrix.name:
            raise KeyboardInterrupt
        real(model, matrix, module)

    with monkeypatch.context() as patch:
        patch.setattr(tensorfold.folding.in_memory, "swap", dies)
        with pytest.raises(KeyboardInterrupt):
            folded(checkpoint=tmp_path / "kept")
    resumed, again = folded(checkpoint=tmp_path / "kept")
    assert again.choices == report.choices
    assert all(torch.equal(whole.state_dict()[key], value) for key, value in resumed.state_dict().items())


@pytest.mark.parametrize("settings", [{"num_key_value_heads": 1}, {"num_key_value_heads": 4}, {"dtype": "bfloat16"}])
def test_searches_look_at_the_entrance_of_every_block(tiny, tokenizer, prose, settings, monkeypatch):
    """And multi-query attention, attention with as many groups as heads and bf16 have value heads too."""
    dtype = getattr(torch, settings.pop("dtype", "float32"))
    model = with_idle_dimensions(tiny("llama", **settings), 4).to(dtype)
    real, stood = search.value_heads, []

    def spy(stream, index, batch):
        stood.append((stream.position, index))
        return real(stream, index, batch)

    monkeypatch.setattr(search, "value_heads", spy)
    recipe = tensorfold.Recipe(fold=(tensorfold.Rule("attention", Auto(keep=0.4, budget="multiply-adds")),))
    report = tensorfold.fold(model, recipe, tokenizer, [prose], calibration_tokens=1024)
    assert stood == [(0, 0), (1, 1)]
    assert any(choice.rows for choice in report.choices.values())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_low_effort_and_bytes_leave_the_heads_alone(tiny, tokenizer, prose):
    for method in (Auto(keep=0.6, effort="low"), Auto(keep=0.7, budget="bytes")):
        recipe = tensorfold.Recipe(fold=(tensorfold.Rule("attention", method),))
        model = with_idle_dimensions(tiny("llama"), 4)
        report = tensorfold.fold(model, recipe, tokenizer, [prose], calibration_tokens=1024)
        assert not any(choice.rows or choice.columns for choice in report.choices.values())
