"""The matrix that error feedback fits, from a layer's calls in the dense model and in the folded one."""

import copy

import pytest
import torch
from torch import nn

import tensorfold
from tensorfold import Auto
from tensorfold.calibration.block_stream import BlockStream, input_moments
from tensorfold.calibration.error_feedback import RIDGE, Reference, _Call, _Sums
from tensorfold.models.anatomy import Matrix, dense_weight, matrices


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(bias, out_features=3, in_features=4):
    linear = nn.Linear(in_features, out_features, bias=bias)
    return Matrix("layer", linear, out_features, in_features, "linear", "mlp")


def sums(matrix, dense, folded, lacks=None, windows=8):
    """Sums after inputs (tokens, in) of both models and lacks (tokens, out), each cut into equal windows."""
    found = _Sums(matrix)
    lacks = [None] * windows if lacks is None else lacks.float()[None].chunk(windows, 1)
    for x, y, lack in zip(
        dense.float()[None].chunk(windows, 1), folded.float()[None].chunk(windows, 1), lacks, strict=True
    ):
        found.add([_Call(x, x)], [_Call(y, y)], lack, x.shape[1])
    return found


EPS = torch.finfo(torch.float32).eps


def regression(weight, dense, folded, lacks, centred, mean_ridge=EPS):
    """The regression of the module's docstring, computed directly in fp64."""
    x, y, d = dense.float().double(), folded.float().double(), lacks.float().double()
    if centred:
        x, y, d = (each - each.mean(0) for each in (x, y, d))
    c = y.T @ y / len(y)
    ridge = RIDGE * c.diagonal() + mean_ridge * c.diagonal().mean()
    wanted = (weight.double() @ x.T @ y + d.T @ y) / len(y) + weight.double() * ridge
    return c, torch.linalg.solve(c + ridge.diag(), wanted.T).T


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("level", [0.0, 1e3])
def test_the_target_is_the_regression(bias, level):
    """Central moments keep a feature of 1000 that varies by a thousandth; plain fp32 sums of squares would lose it."""
    if level and not bias:
        pytest.skip("about the origin such a feature is a constant, and fp32 sums have its square")
    matrix = layer(bias)
    scale = torch.tensor([1.0, 1e-3 if level else 1.0, 0.5, 2.0], dtype=torch.float64)
    shift = torch.tensor([0.0, level, -3.0, 0.1], dtype=torch.float64)
    dense = normal(4096, 4, seed=1) * scale + shift
    folded = dense + 0.1 * normal(4096, 4, seed=2) * scale
    lacks = 0.3 * normal(4096, 3, seed=3) + 7
    known = sums(matrix, dense, folded, lacks).statistics("layer")
    c, target = regression(matrix.module.weight.detach(), dense, folded, lacks, centred=bias)
    deviation = c.diagonal().sqrt()
    assert ((known.input_moment - c).abs() <= 1e-4 * deviation.outer(deviation)).all()
    assert ((known.target - target).abs() * deviation <= 1e-4 * (target.abs() * deviation).max()).all()
    if bias:
        mean = dense.float().double().mean(0)
        wanted = matrix.module.weight.detach().double() @ mean + lacks.float().double().mean(0)
        torch.testing.assert_close(known.means.given, folded.float().double().mean(0), rtol=0, atol=1e-8 + 1e-9 * level)
        torch.testing.assert_close(known.means.wanted, wanted, rtol=1e-7, atol=1e-7)


def test_inputs_that_hardly_vary_stay_as_they_were():
    """Under a ridge that is the same for all inputs, the regression leaves alone what the text says little of."""
    matrix, dense = layer(False), normal(4096, 4, seed=1) * torch.tensor([1.0, 1.0, 1e-3, 2.0])
    folded = dense + 0.3 * normal(4096, 4, seed=2) * dense.std(0)
    lacks = torch.zeros(4096, 3, dtype=torch.float64)
    weight = matrix.module.weight.detach()
    found = sums(matrix, dense, folded, lacks)
    target = found.statistics("layer", mean_ridge=0.1).target
    _, wanted = regression(weight, dense, folded, lacks, False, mean_ridge=0.1)
    torch.testing.assert_close(target, wanted.float(), rtol=1e-4, atol=1e-5)
    moved, free = ((each - weight).norm(dim=0) for each in (target, found.statistics("layer").target))
    assert moved[2] < 1e-3 * free[2]
    assert (moved[[0, 1, 3]] > 0.3 * free[[0, 1, 3]]).all()


@pytest.mark.parametrize("value", [10.1, 1e3, -0.1, 0.0])
def test_a_feature_that_never_varies_weighs_nothing(value):
    matrix = layer(True)
    inputs = normal(8000, 4, seed=1)
    inputs[:, 2] = value
    known = sums(matrix, inputs, inputs).statistics("layer")
    assert known.input_moment.diagonal().min() == 0
    assert not known.input_moment[2].any()
    torch.testing.assert_close(known.target, matrix.module.weight.detach(), rtol=1e-4, atol=1e-5)
    assert known.means.given[2] == torch.tensor(value).double()
    still = torch.full((8000, 4), value, dtype=torch.float64)
    torch.testing.assert_close(sums(matrix, still, still).statistics("layer").target, matrix.module.weight.detach())


def test_without_pairs_the_moment_is_about_the_origin():
    matrix, inputs = layer(True), normal(800, 4, seed=1) + torch.tensor([0.0, 10.1, -3.0, 1.0])
    found = sums(matrix, inputs, inputs)
    found.add([], [_Call(inputs.float(), inputs)], None, len(inputs))
    known = found.statistics("layer")
    assert (known.target, known.means) == (None, None)
    torch.testing.assert_close(known.input_moment, (inputs.T @ inputs / 800).float())


@pytest.mark.parametrize(("gain", "level"), [(0.0, 10.1), (0.0, 1e3), (1e-3, 1e3)])
def test_constant_features_do_not_end_a_fold(tiny, tokenizer, prose, gain, level):
    """A layer with a bias is fitted where the norm before it makes one feature (nearly) constant."""
    model = tiny("gpt2")
    for block in model.transformer.h:
        block.ln_2.weight.data[5], block.ln_2.bias.data[5] = gain, level
        block.mlp.c_fc.bias.data -= level * dense_weight(block.mlp.c_fc)[:, 5].detach()
    ids = torch.tensor(tokenizer(prose)["input_ids"][:100])[None]
    with torch.no_grad():
        wanted = model(ids).logits
        tensorfold.fold(model, Auto(keep=0.9), tokenizer, [prose], calibration_tokens=512)
        got = model(ids).logits
    assert (got - wanted).norm() < 0.3 * (wanted - wanted.mean()).norm()


def test_experts_have_pairs_where_they_are_sent_the_same_tokens():
    matrix, states = layer(False), normal(60, 4, seed=1).float()
    sent, others = states[:40], states[20:]
    for folded, paired in ((sent + 1e-3, True), (others, False), (sent[1:], False)):
        found = _Sums(matrix)
        found.add([_Call(sent, sent)], [_Call(folded, folded)], None, len(states))
        assert (found.statistics("layer").target is not None) == paired
    found = _Sums(matrix)
    found.add([_Call(sent, sent)], [_Call(others, others)], None, 40)  # calls with all tokens need no comparison
    assert found.statistics("layer").target is not None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("called", [True, False])
def test_experts_make_up_for_inputs_that_are_gone(bias, called):
    """From the dense model's tokens, where the folded one's router sends the expert others, or none at all."""
    matrix, states = layer(bias), normal(60, 4, seed=1)
    states[:, 3] = states[:, 0] - 2 * states[:, 2]
    states = states.float()
    gone = torch.tensor([False, True, False, True])
    weight = matrix.module.weight.detach()
    folded = states[20:].masked_fill(gone, 0.0)
    found = _Sums(matrix, partial=True)
    found.add([_Call(states[:40], states[:40])], [_Call(folded, folded)] if called else [], None, len(states))
    target = found.statistics("layer", weight.masked_fill(gone, 0.0)).target
    kept = states[:40][:, ~gone]
    best = torch.linalg.lstsq(kept, states[:40] @ weight.T).solution.T
    torch.testing.assert_close(target[:, ~gone], best, rtol=1e-4, atol=1e-4)
    assert not target[:, gone].any()


class Twice(nn.Module):
    """An MLP whose first layer is applied again to what it gave, beside one that sees only the first input."""

    def __init__(self, bias):
        super().__init__()
        self.again, self.once, self.down = nn.Linear(32, 32, bias), nn.Linear(32, 32, bias), nn.Linear(32, 32, bias)

    def forward(self, x):
        return self.down(self.again(torch.tanh(self.again(x))) * torch.sigmoid(self.once(x)))


@pytest.fixture(params=[False, True], ids=["no bias", "bias"])
def twice(request, tiny):
    """A model with such an MLP in every block."""
    model = tiny("llama")
    torch.manual_seed(1)
    for block in model.model.layers:
        block.mlp = Twice(request.param)
    return model.eval()


def test_moments_of_a_layer_that_is_called_twice_are_of_both_calls(twice):
    mlp, x = twice.model.layers[0].mlp, normal(50, 32, seed=1).float()
    with torch.no_grad():
        moments = input_moments(lambda: mlp(x), dict(mlp.named_children()))
        both = torch.cat([x, torch.tanh(mlp.again(x))])
    torch.testing.assert_close(moments["again"], both.T @ both / 100)
    torch.testing.assert_close(moments["once"], x.T @ x / 50)


@pytest.mark.usefixtures("exact_products")
def test_a_layer_that_is_called_twice_is_fitted_to_both_calls(twice):
    windows = torch.randint(5, 290, (4, 30), generator=torch.Generator().manual_seed(1))
    dense = copy.deepcopy(twice)
    mlp = twice.model.layers[0].mlp
    chosen = {
        name: each for name, each in matrices(twice).items() if name.endswith(("0.mlp.again", "0.self_attn.o_proj"))
    }
    stage = {name: each for name, each in chosen.items() if name.endswith("again")}
    reference = Reference(twice, windows, chosen)
    other = twice.model.layers[0].self_attn.o_proj = copy.deepcopy(twice.model.layers[0].self_attn.o_proj)
    other.weight.data *= 0.5  # in place of an earlier fold
    stream = BlockStream(twice, windows)
    known = reference.statistics(stream, 0, stage, last=False)[next(iter(stage))]
    calls = {}
    for which, model in (("dense", dense), ("folded", twice)):
        seen = calls[which] = []
        handle = model.model.layers[0].mlp.again.register_forward_hook(
            lambda _, args, __, seen=seen: seen.append(args[0])
        )
        for window in windows:
            model(window[None], use_cache=False)
        handle.remove()
    x, y = (torch.cat([each.flatten(0, 1) for each in calls[which]]).double() for which in ("dense", "folded"))
    weight, bias = mlp.again.weight.detach(), mlp.again.bias
    _, target = regression(weight, x, y, torch.zeros(len(x), 32), centred=bias is not None)
    torch.testing.assert_close(known.target.double(), target, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(known.target, weight, atol=1e-2)


@pytest.mark.parametrize("effort", ["low", "medium", "high"])
def test_models_with_such_layers_are_folded(twice, tokenizer, prose, effort, monkeypatch):
    # The model is made by hand and not saved.
    monkeypatch.setattr(tensorfold.folding.in_memory, "check_described", lambda _: None)
    report = tensorfold.fold(twice, Auto(keep=0.5, effort=effort), tokenizer, [prose], calibration_tokens=512)
    assert any(name.endswith("again") for name in report.choices)


@pytest.mark.usefixtures("exact_products")
def test_what_lies_behind_a_stage_runs_once(tiny):
    """On the first window, which shows that every layer is called once; later ones end with the stage."""
    model, windows = tiny("llama").eval(), torch.randint(5, 290, (4, 30), generator=torch.Generator().manual_seed(1))
    chosen = {name: matrix for name, matrix in matrices(model).items() if matrix.kind == "linear"}
    reference, stream = Reference(model, windows, chosen), BlockStream(model, windows)
    stage = {name: matrix for name, matrix in chosen.items() if "layers.0.self_attn.q" in name}
    calls = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: calls.append(1))
    plain = input_moments(
        lambda: [stream.run(0, slice(k, k + 1)) for k in range(4)], {n: m.module for n, m in stage.items()}
    )
    before = len(calls)
    known = reference.statistics(stream, 0, stage, last=False)
    after_first, calls[:] = len(calls) - before, []
    reference.statistics(stream, 0, stage, last=True)
    assert len(calls) >= 4
    assert after_first < 2 * 4  # of both models
    for name in stage:
        torch.testing.assert_close(known[name].input_moment, plain[name])
