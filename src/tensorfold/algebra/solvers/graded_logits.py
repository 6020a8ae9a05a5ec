"""Graded tables fitted to the probabilities that a tied head gives, rather than to its logits.

The error of a fit is second order: how much a wrong logit costs depends on how probable its token is there. What
remains is first order. A row's part of the mean divergence ``KL(p ‖ p̂)`` over hidden states h, with ``p̂`` the
probabilities of the fitted table, has

    gradient  E[(p̂_t − p_t) h],   curvature at most  E[p̂_t h hᵀ]   (a softmax's Hessian is diag(p̂) − p̂ p̂ᵀ)

so that all rows can take a Newton step at once, each in its own few coefficients. The curvature is taken at the larger
of p and p̂, mixed with the average one of all tokens, and steps are cut short: the bound holds only near by, and no step
is checked. Beside it stands what the row's error costs where its token enters the model, ``½ f_t ‖δ‖²`` in the
second moment of the loss's gradient there, with f_t the token's share of the text.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tensorfold.algebra.solvers.solve import Factors
from tensorfold.algebra.specs.graded import GradedSpec

_LARGEST_RANK = 128  # of the classes that are matched; others are near enough, and their curvatures large
_PRIOR = 0.2  # share of the average curvature in a row's own, which few states may have shown
_DAMPING = 1e-3
_CHANGE = 1.0  # nats: largest root mean square change of a logit in one step, where its token is probable
_CHUNK = 2**24  # elements of an intermediate


@torch.no_grad()
def match_probabilities(
    table: Tensor,
    factors: Factors,
    spec: GradedSpec,
    states: Tensor,
    shares: Tensor,
    gradients: Tensor,
    steps: int = 2,
) -> Factors:
    """Take Newton steps in the coefficients of all classes of small rank; the basis and other classes stay.

    Args:
        table: What ``factors`` approximate, shape (vocabulary, width).
        states: What the head reads, shape (n, width).
        shares: f, of each token in the text, shape (vocabulary,); they add up to 1.
        gradients: Second moment of the loss's gradient where rows enter the model, shape (width, width), for a loss in
            nats a token.
    """
    assert factors.out_order is not None
    if not spec.basis or min(spec.ranks) > _LARGEST_RANK:
        return factors
    order, basis = factors.out_order, factors.cores[-1].float()
    cores = [core.float().clone() for core in factors.cores]
    given, shares, states = table[order].float(), shares.to(order.device)[order].float(), states.to(basis)
    entering = gradients.to(basis)
    dense = _log_partition(states, given)
    for _ in range(steps):
        now = torch.cat([core if core.shape[1] == spec.width else core @ basis[: core.shape[1]] for core in cores[:-1]])
        fitted = _log_partition(states, now)
        for start, core in zip(spec.starts, cores[:-1], strict=True):
            tokens, rank = core.shape
            if rank > _LARGEST_RANK or rank == spec.width:
                continue
            into = basis[:rank] @ entering  # (rank, width)
            for some in torch.arange(tokens, device=core.device).split(max(1, _CHUNK // rank**2)):
                rows = some + start
                head = _of_head(states, basis[:rank], (given[rows], dense), (now[rows], fitted))
                share = shares[rows, None]
                slope = head.slope + share * ((now[rows] - given[rows]) @ into.T)
                core[some] -= _step(head, slope, share[:, :, None] * (into @ basis[:rank].T))
    return factors._replace(cores=[new.to(old) for new, old in zip(cores, factors.cores, strict=True)])


def _log_partition(states: Tensor, table: Tensor) -> Tensor:
    """``log Σ_t exp(e_t · h)`` for every state, shape (n,)."""
    return torch.cat([torch.logsumexp(some @ table.T, -1) for some in states.split(max(1, _CHUNK // len(table)))])


class _Head(NamedTuple):
    """What the head says of some rows' coefficients: slopes (tokens, rank), probabilities' means (tokens,), curvatures
    (tokens, rank, rank) and their average over all tokens at equal probabilities (rank, rank)."""

    slope: Tensor
    mass: Tensor
    curvature: Tensor
    average: Tensor


def _of_head(states: Tensor, basis: Tensor, dense: tuple[Tensor, Tensor], fitted: tuple[Tensor, Tensor]) -> _Head:
    """Means over the states; ``dense`` and ``fitted`` are rows and all states' partition functions."""
    (tokens, _), rank = dense[0].shape, len(basis)
    slope, mass = basis.new_zeros(tokens, rank), basis.new_zeros(tokens)
    curvature, average = basis.new_zeros(tokens, rank * rank), basis.new_zeros(rank, rank)
    for some in torch.arange(len(states), device=states.device).split(max(1, _CHUNK // max(rank**2, tokens))):
        seen = states[some]
        read = seen @ basis.T  # (states, rank)
        before, after = (torch.exp(seen @ rows.T - whole[some, None]) for rows, whole in (dense, fitted))
        slope.addmm_((after - before).T, read)
        likely = torch.maximum(before, after)  # (states, tokens)
        mass += likely.sum(0)
        curvature.addmm_(likely.T, (read[:, :, None] * read[:, None, :]).flatten(1))
        average.addmm_(read.T, read)
    n = len(states)
    return _Head(slope / n, mass / n, curvature.reshape(tokens, rank, rank) / n, average / n)


def _step(head: _Head, slope: Tensor, entering: Tensor) -> Tensor:
    """The Newton step, shape (tokens, rank), cut short where it would change logits too much."""
    curvature = (1 - _PRIOR) * head.curvature + _PRIOR * head.mass[:, None, None] * head.average + entering
    scale = curvature.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(slope.dtype).tiny / _DAMPING)
    curvature.diagonal(dim1=1, dim2=2).add_(_DAMPING * scale[:, None])
    step = torch.linalg.solve(curvature, slope[:, :, None])  # (tokens, rank, 1)
    change = (step.mT @ head.curvature @ step).flatten() / head.mass.clamp_min(torch.finfo(slope.dtype).tiny)
    return step.squeeze(-1) * (_CHANGE / change.clamp_min(0).sqrt().clamp_min(_CHANGE))[:, None]
