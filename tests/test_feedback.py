"""What a layer is fitted to, from the calls that it gets in the dense model and in the folded one."""

import pytest
import torch
from torch import nn

import tensorfold
from tensorfold import Auto
from tensorfold.anatomy import Matrix, dense_weight
from tensorfold.feedback import RIDGE, _Call, _Sums


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(bias, out_features=3, in_features=4):
    linear = nn.Linear(in_features, out_features, bias=bias)
    return Matrix("layer", linear, out_features, in_features, "linear", "mlp")


def sums(matrix, dense, folded, lacks=None, windows=8):
    """After inputs (tokens, in) of both models, and lacks (tokens, out), in windows of one batch."""
    found = _Sums(matrix)
    lacks = [None] * windows if lacks is None else lacks.float()[None].chunk(windows, 1)
    for x, y, lack in zip(
        dense.float()[None].chunk(windows, 1), folded.float()[None].chunk(windows, 1), lacks, strict=True
    ):
        found.add([_Call(x, x)], [_Call(y, y)], lack)
    return found


def regression(weight, dense, folded, lacks, centred):
    """The formula of the module's docstring in fp64."""
    x, y, d = dense.float().double(), folded.float().double(), lacks.float().double()
    if centred:
        x, y, d = (each - each.mean(0) for each in (x, y, d))
    c = y.T @ y / len(y)
    ridge = RIDGE * c.diagonal() + torch.finfo(torch.float32).eps * c.diagonal().mean()
    wanted = (weight.double() @ x.T @ y + d.T @ y) / len(y) + weight.double() * ridge
    return c, torch.linalg.solve(c + ridge.diag(), wanted.T).T


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("level", [0.0, 1e3])
def test_the_target_is_the_regression(bias, level):
    """Also where a feature is a thousand and varies by a thousandth: fp32 sums of squares would have none of that."""
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
    assert ((known.inputs - c).abs() <= 1e-4 * deviation.outer(deviation)).all()
    assert ((known.target - target).abs() * deviation <= 1e-4 * (target.abs() * deviation).max()).all()
    if bias:
        mean = dense.float().double().mean(0)
        wanted = matrix.module.weight.detach().double() @ mean + lacks.float().double().mean(0)
        torch.testing.assert_close(
            known.means.inputs, folded.float().double().mean(0), rtol=0, atol=1e-8 + 1e-9 * level
        )
        torch.testing.assert_close(known.means.outputs, wanted, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("value", [10.1, 1e3, -0.1, 0.0])
def test_a_feature_that_never_varies_weighs_nothing(value):
    matrix = layer(True)
    inputs = normal(8000, 4, seed=1)
    inputs[:, 2] = value
    known = sums(matrix, inputs, inputs).statistics("layer")
    assert known.inputs.diagonal().min() == 0
    assert not known.inputs[2].any()
    torch.testing.assert_close(known.target, matrix.module.weight.detach(), rtol=1e-4, atol=1e-5)
    assert known.means.inputs[2] == torch.tensor(value).double()
    still = torch.full((8000, 4), value, dtype=torch.float64)
    torch.testing.assert_close(sums(matrix, still, still).statistics("layer").target, matrix.module.weight.detach())


def test_without_pairs_the_moment_is_about_the_origin():
    matrix, inputs = layer(True), normal(800, 4, seed=1) + torch.tensor([0.0, 10.1, -3.0, 1.0])
    found = sums(matrix, inputs, inputs)
    found.add([], [_Call(inputs.float(), inputs)], None)
    known = found.statistics("layer")
    assert (known.target, known.means) == (None, None)
    torch.testing.assert_close(known.inputs, (inputs.T @ inputs / 800).float())


@pytest.mark.parametrize(("gain", "level"), [(0.0, 10.1), (0.0, 1e3), (1e-3, 1e3)])
def test_constant_features_do_not_end_a_fold(tiny, tokenizer, prose, gain, level):
    """A norm's gain and bias make one feature of the biased layer behind it (nearly) constant."""
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
