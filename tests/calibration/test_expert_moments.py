"""Moments of experts that few tokens reach."""

import pytest
import torch
from torch import nn

from tensorfold.calibration.expert_moments import shrinkage, shrunk_experts
from tensorfold.models.anatomy import Matrix

WIDTH = 8


def experts(tensor, rows, columns, count=3):
    names = [f"model.layers.0.mlp.experts.{tensor}.{k}" for k in range(count)]
    return [Matrix(name, nn.Identity(), rows, columns, "linear", "experts") for name in names]


def sample(tokens, scale=1.0, seed=0, width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64) * torch.linspace(0.2, 2.0, width) * scale
    return x.T @ x / tokens


def test_the_amount_is_that_of_least_expected_error():
    """Over many draws no fixed amount does better than the formula's with the true moment in it."""
    truth = torch.diag(torch.linspace(0.2, 2.0, WIDTH).double() ** 2)
    target = torch.eye(WIDTH, dtype=torch.float64)
    amount = float((truth.trace() ** 2 + truth.square().sum()) / 20)
    amount /= amount + float((truth - target).square().sum())
    errors = {}
    for shift in (-0.15, 0.0, 0.15):
        a = amount + shift
        drawn = [(1 - a) * sample(20, seed=seed) + a * target - truth for seed in range(300)]
        errors[shift] = sum(float(each.square().sum()) for each in drawn)
    assert errors[0.0] == min(errors.values())
    estimates = torch.tensor([shrinkage(sample(20, seed=seed), target, 20) for seed in range(300)])
    assert float(estimates.mean()) == pytest.approx(amount, abs=0.1)


def test_experts_of_few_tokens_take_their_layers_moment():
    layers = experts("gate_up_proj", 12, WIDTH)
    first, second, third = (layer.name for layer in layers)
    moments = {first: sample(4000), second: sample(4, 3.0, seed=1), "other": sample(3)}
    found = shrunk_experts(moments, {first: 4000, second: 4}, layers, WIDTH)
    pooled = (moments[first] * 4000 + moments[second] * 4) / 4004
    torch.testing.assert_close(found[third], pooled)  # sent nothing
    assert (found[first] - moments[first]).norm() < 0.05 * moments[first].norm()
    assert (found[second] - pooled).norm() < (moments[second] - pooled).norm()
    assert found["other"] is moments["other"]


def test_units_of_an_expert_are_its_own():
    layers = experts("down_proj", WIDTH, 12)
    first, second, _ = (layer.name for layer in layers)
    moments = {first: sample(4000, width=12), second: sample(4, seed=1, width=12)}
    found = shrunk_experts(moments, {first: 4000, second: 4}, layers, WIDTH)
    mean = moments[second].diagonal().mean()
    off = found[second] - mean * torch.eye(12)
    assert off.norm() < (moments[second] - mean * torch.eye(12)).norm()
    torch.testing.assert_close(found[second].diagonal().mean(), mean)
