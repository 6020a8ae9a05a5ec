"""Graded tables fitted to the dense head's probabilities: the divergence falls, and what must stay stays."""

import pytest
import torch

from tensorfold.algebra.solvers import graded_logits
from tensorfold.algebra.solvers.graded import graded_low_rank
from tensorfold.algebra.solvers.graded_logits import match_probabilities
from tensorfold.algebra.specs.graded import GradedSpec
from tensorfold.nn import GradedEmbedding

VOCABULARY, WIDTH = 200, 24
SPEC = GradedSpec(VOCABULARY, WIDTH, ((10, 24), (30, 9), (60, 4), (100, 2)))


def make(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def problem():
    """A table, states with a mean as hidden states have, shares by Zipf's law, and gradients' second moment."""
    table = make(VOCABULARY, WIDTH)
    states = make(600, WIDTH, seed=1) * torch.linspace(0.2, 1, WIDTH) + 0.3
    shares = 1 / (torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(2)) + 1.0)
    roots = make(50, WIDTH, seed=3)
    return table, states, (shares / shares.sum()).double(), 0.01 * (roots.T @ roots / 50)


def start(problem):
    table, states, shares, gradients = problem
    return graded_low_rank(table, SPEC, shares, (states.T @ states / len(states) + gradients).double())


def rows(factors):
    embedding = GradedEmbedding(SPEC)
    embedding.load_factors(factors)
    return embedding.to_dense().detach()


def cost(problem, fitted):
    """Mean divergence of the head's probabilities, and half of the squared error where rows enter."""
    table, states, shares, gradients = problem
    log_p, log_q = ((states @ t.T).log_softmax(-1) for t in (table, fitted))
    divergence = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    error = (fitted - table).double()
    return divergence + 0.5 * float(shares @ ((error @ gradients.double()) * error).sum(1))


def test_each_step_lowers_the_cost(problem):
    table, states, shares, gradients = problem
    factors = start(problem)
    costs = [cost(problem, rows(factors))]
    for _ in range(3):
        factors = match_probabilities(table, factors, SPEC, states, shares, gradients, steps=1)
        costs.append(cost(problem, rows(factors)))
    assert costs == sorted(costs, reverse=True)
    assert costs[1] < 0.9 * costs[0]


def test_exact_rows_large_ranks_and_basis_stay(problem, monkeypatch):
    table, states, shares, gradients = problem
    monkeypatch.setattr(graded_logits, "_LARGEST_RANK", 4)
    before = start(problem)
    after = match_probabilities(table, before, SPEC, states, shares, gradients)
    same = [torch.equal(old, new) for old, new in zip(before.cores, after.cores, strict=True)]
    assert same == [True, True, False, False, True]
    assert torch.equal(before.out_order, after.out_order)


def test_chunks_change_nothing(problem, monkeypatch):
    table, states, shares, gradients = problem
    whole = match_probabilities(table, start(problem), SPEC, states, shares, gradients)
    monkeypatch.setattr(graded_logits, "_CHUNK", 1000)
    pieces = match_probabilities(table, start(problem), SPEC, states, shares, gradients)
    for one, other in zip(whole.cores, pieces.cores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
