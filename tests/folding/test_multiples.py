"""Ranks, hidden units and heads that are held to multiples, for engines that store weights in groups."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tensorfold
from tensorfold import Auto, LowRank, SpecError
from tensorfold.algebra.allocation import pivoted_costs
from tensorfold.errors import InputError
from tensorfold.folding.budgets import divide
from tensorfold.folding.plan import Budget, plan
from tensorfold.models.anatomy import matrices

SIDES = st.integers(2, 200)
TEXT = {"calibration_tokens": 512}


@settings(max_examples=200, deadline=None)
@given(SIDES, SIDES, st.floats(0.02, 0.98), st.integers(1, 40), st.booleans())
def test_a_rank_is_the_largest_multiple_within_the_budget(rows, columns, keep, multiple, pivots):
    method = LowRank(keep=keep, multiple=multiple, pivots=pivots)
    cost = lambda rank: rank * (rows + columns - rank * pivots)  # noqa: E731
    try:
        spec = method.spec(rows, columns)
    except SpecError:
        assert cost(multiple) > int(keep * rows * columns) or multiple > min(rows, columns)
        return
    rank = spec.ranks[0]
    assert rank % multiple == 0
    assert spec.parameters == cost(rank) <= keep * rows * columns
    assert cost(rank + multiple) > int(keep * rows * columns) or rank + multiple > min(rows, columns)


@pytest.mark.parametrize("multiple", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(6))
def test_a_division_is_within_the_budget_whatever_the_curves_are(tiny, multiple, seed):
    model = tiny("llama")
    method = Auto(keep=0.3 + 0.1 * seed, multiple=multiple)
    planned, found = plan(model, method), matrices(model)
    names = tuple(name for name, matrix in found.items() if matrix.group == "mlp")
    generator, losses = torch.Generator().manual_seed(seed), {}
    for name in names:
        drops = torch.rand(min(found[name].parameter.shape) + 1, generator=generator, dtype=torch.float64) ** 4
        losses[name] = drops.flip(0).cumsum(0).flip(0) - drops[-1]
    budget = Budget(method, names)
    choices, changes = divide(budget, planned, found, losses)
    dense = sum(found[name].parameter.numel() for name in names)
    assert not changes
    assert sum(choice.parameters for choice in choices.values()) <= budget.total(dense)
    for name, choice in choices.items():
        assert choice.dense or choice.rank % multiple == 0
        assert choice.parameters == pivoted_costs(*found[name].parameter.shape)[choice.rank]


@pytest.mark.parametrize(("architecture", "effort"), [("llama", "medium"), ("gpt2", "high"), ("llama", "low")])
def test_a_fold_by_text_holds_all_of_them(tiny, tokenizer, prose, architecture, effort):
    model = tiny(architecture)
    before = sum(
        matrix.parameter.numel() for matrix in matrices(model).values() if matrix.group in ("mlp", "attention")
    )
    recipe = tensorfold.Recipe.keep(0.6, "all-linear", effort, multiple=4)
    report = tensorfold.fold(model, recipe, tokenizer, [prose], **TEXT)
    assert any(not choice.dense for choice in report.choices.values())
    for choice in report.choices.values():
        assert choice.dense or choice.rank % 4 == 0  # 4 divides the sides themselves
        assert choice.rows % 4 == choice.columns % 4 == 0
        assert choice.groups == 1
    assert sum(choice.parameters for choice in report.choices.values()) <= 0.6 * before
    assert set(report.to_dict()["multiples"].values()) == {4}


def test_without_text_all_ranks_are(tiny):
    report = tensorfold.fold(tiny("llama"), Auto(keep=0.5, multiple=4))
    assert {spec.ranks[0] % 4 for spec in report.modules.values()} == {0}
    assert report.to_dict()["multiples"].keys() == report.modules.keys()
    assert "multiples" not in tensorfold.plan(tiny("llama"), Auto(keep=0.5)).to_dict()


def test_a_plain_model_has_a_multiple_of_units(tiny, tokenizer, prose):
    model = tiny("llama")
    tensorfold.fold(model, Auto(keep=0.75, plain=True, multiple=8), tokenizer, [prose], **TEXT)
    assert model.config.intermediate_size == 32  # 36 without


def test_what_cannot_be_is_said(tiny):
    with pytest.raises(SpecError, match=r"leaves a rank of \d+ and multiple=32; take a smaller multiple"):
        tensorfold.plan(tiny("llama"), Auto(keep=0.5, multiple=32))
    with pytest.raises(InputError, match="multiple has no effect here; it needs keep"):
        LowRank(rank=8, multiple=4)
    with pytest.raises(InputError, match="multiple"):
        Auto(keep=0.5, multiple=0)


def test_from_the_command_line(command, dense_directory):
    planned = command("plan", dense_directory, "--keep", "0.5", "--multiple", "4", "--json")
    assert planned.status == 0, planned.err
    assert '"multiples"' in planned.out
