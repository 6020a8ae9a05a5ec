"""Gradient moments taken block by block are those of one backward pass through the whole model."""

import pytest
import torch

from tensorfold.calibration.gradient_walk import walk_gradient_moments
from tensorfold.calibration.gradients import gradient_moments
from tensorfold.models.anatomy import blocks, matrices

PREFIX = 1


def windows(length=70):
    return torch.randint(3, 300, (3, length), generator=torch.Generator().manual_seed(1))


def walked(model, text, modules, rounded=False):
    found, order = {}, []

    def keep(moments):
        order.append(set(moments))
        found.update(moments)

    def allocate(shape, dtype):
        return torch.full(shape, torch.nan, dtype=dtype)

    walk_gradient_moments(model, text, modules, PREFIX, rounded, allocate, keep)
    return found, order


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3", "opt", "phi", "gpt_neox"])
def test_block_by_block_as_in_one_pass(tiny, monkeypatch, architecture, rounded):
    monkeypatch.setattr("tensorfold.calibration.gradients._WINDOW", 32)  # pieces of two lengths
    model, text = tiny(architecture), windows()
    name = blocks(model)[0]
    modules = {key: matrix.module for key, matrix in matrices(model).items() if key.startswith(f"{name}.")}
    expected = gradient_moments(model, text, modules, PREFIX, rounded, drawn=True)
    found, order = walked(model, text, modules, rounded)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key].values, expected[key].values) for key in expected)
    assert [{key.removeprefix(f"{name}.")[0] for key in part} for part in order] == [{"1"}, {"0"}]
    assert all(parameter.requires_grad for parameter in model.parameters())
