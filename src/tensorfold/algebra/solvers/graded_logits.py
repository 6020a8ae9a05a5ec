"""Graded tables fitted to the probabilities that a tied head gives, rather than to its logits.

Notation:
    E, Ê        dense and fitted table, (vocabulary, width); e_t, ê_t their rows for token t
    h           hidden state that the head reads, (width,); n of them are given
    p_t, p̂_t    probability of token t at h, from E and from Ê
    δ           error of a row, ê_t − e_t, (width,)
    f_t         share of token t in the text; all add up to 1
    G           gradient moment where rows enter the model, (width, width), in nats² per squared unit of a row
    B           basis of a class, (r, width); every row of the class is its coefficients (r,) times B

The squared error of a fit says nothing of how probable a token is where its logit is wrong. The part of row t in the
mean of ``KL(p ‖ p̂)`` over h, in nats, has

    gradient  E[(p̂_t − p_t) h],   curvature at most  E[p̂_t h hᵀ]   (a softmax's Hessian is diag(p̂) − p̂ p̂ᵀ)

so that all rows can take a Newton step at once, each in its own few coefficients. The curvature is taken at the larger
of p and p̂ and mixed with its average over all tokens, and steps are cut short, because the bound holds only near by
and no step is checked. Added to the divergence is ``½ f_t δᵀ G δ``: what the row's error costs where its token enters
the model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tensorfold.algebra.solvers.solve import Factors
from tensorfold.algebra.specs.graded import GradedSpec

_LARGEST_RANK = 128  # classes of a larger rank are near enough as they are, and their curvatures (r, r) large
_PRIOR = 0.2  # share of the average curvature in a row's own, which few states may have shown
_DAMPING = 1e-3  # added to a curvature's diagonal, as a part of its mean
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
    """Lower ``KL(p ‖ p̂)`` by Newton steps in the coefficients of all classes of rank up to 128; the rest stays.

    Args:
        table: E, shape (vocabulary, width).
        factors: Cores of a graded table fitted to E, and its ``out_order``.
        spec: Theirs.
        states: h, shape (n, width).
        shares: f, shape (vocabulary,).
        gradients: G, shape (width, width), for a loss in nats a token.
        steps: How many Newton steps.

    Returns:
        Factors of the same shapes and dtypes.
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
    """Logarithm of the partition function, ``log Σ_t exp(e_t · h)``, of every state h, shape (n,)."""
    return torch.cat([torch.logsumexp(some @ table.T, -1) for some in states.split(max(1, _CHUNK // len(table)))])


class _Head(NamedTuple):
    """Derivatives of the mean ``KL(p ‖ p̂)`` in the coefficients of some rows, in nats.

    Attributes:
        slope: Gradient, (tokens, rank).
        mass: Mean over the states of the larger of p and p̂, (tokens,).
        curvature: Bound on the Hessian of every row, (tokens, rank, rank).
        average: Second moment of ``B h``, (rank, rank): the curvature per unit of mass, averaged over all tokens.
    """

    slope: Tensor
    mass: Tensor
    curvature: Tensor
    average: Tensor


def _of_head(states: Tensor, basis: Tensor, dense: tuple[Tensor, Tensor], fitted: tuple[Tensor, Tensor]) -> _Head:
    """Derivatives of the divergence as means over the states.

    Args:
        states: h, (n, width).
        basis: B, (rank, width).
        dense: Rows of E, (tokens, width), and the log partition function of E at every state, (n,).
        fitted: Rows and log partition function of Ê.
    """
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
    """Newton step in the coefficients, (tokens, rank), cut so that logits change by at most ``_CHANGE`` nats.

    Args:
        head: Derivatives of the divergence at the head.
        slope: Gradient of the whole objective, (tokens, rank).
        entering: Hessian of ``½ f_t δᵀ G δ``, (tokens, rank, rank).
    """
    curvature = (1 - _PRIOR) * head.curvature + _PRIOR * head.mass[:, None, None] * head.average + entering
    scale = curvature.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(slope.dtype).tiny / _DAMPING)
    curvature.diagonal(dim1=1, dim2=2).add_(_DAMPING * scale[:, None])
    step = torch.linalg.solve(curvature, slope[:, :, None])  # (tokens, rank, 1)
    change = (step.mT @ head.curvature @ step).flatten() / head.mass.clamp_min(torch.finfo(slope.dtype).tiny)
    return step.squeeze(-1) * (_CHANGE / change.clamp_min(0).sqrt().clamp_min(_CHANGE))[:, None]
