"""Alternating least squares for a tensor train over experts, ``W_e ≈ U S_e V``.

Notation, E experts with m outputs and n inputs:
    W_e         matrix of expert e, (m, n)
    C_e         input moment of expert e, (n, n); the identity without text
    p_e         its share of the vectors that all experts were given, (E,); 1 / E without text
    U, S_e, V   shared bases (m, p) and (q, n), and cores (p, q)
    A_e         U S_e, (m, q)
    K_e         V C_e Vᵀ, (q, q)

The error is ``Σ_e p_e ‖(W_e − U S_e V) C_e^½‖²``, so experts that many tokens are sent to bend the bases their way. For
a given V every A_e is a regression of its own, and U follows from all of them at once:

    A_e = W_e C_e Vᵀ K_e⁻¹        U: p leading eigenvectors of Σ_e p_e A_e K_e A_eᵀ        S_e = Uᵀ A_e

which is exact, since what U leaves out of W_e and what V leaves out of it are orthogonal in that metric. For given U
and S_e, V solves normal equations by conjugate gradients. It starts from the higher-order singular value decomposition
in the metric of the pooled moment ``C = Σ_e p_e C_e``, and for q = n, where V is the identity, U is optimal at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tensorfold.algebra.solvers.low_rank import roots
from tensorfold.algebra.solvers.normal_equations import conjugate_gradients, proximal_step
from tensorfold.algebra.solvers.ttsvd import leading_eigenvectors
from tensorfold.algebra.specs.expert_train import ExpertTrain
from tensorfold.errors import SpecError

_STEPS = 8  # conjugate-gradient steps of a round


def fit_expert_train(
    weights: Tensor,
    spec: ExpertTrain,
    moments: Tensor | None = None,
    shares: Tensor | None = None,
    *,
    rounds: int = 6,
) -> tuple[list[Tensor], tuple[float, ...]]:
    """Fit U, S and V; the error does not rise from round to round.

    Args:
        weights: W, shape (E, m, n), any floating dtype.
        spec: Sizes of the cores.
        moments: C_e, shape (E, n, n), symmetric positive semidefinite; identities if None.
        shares: p_e, shape (E,), not negative; equal if None.
        rounds: Updates of V; none are made where it is the identity.

    Returns:
        Cores of shapes ``spec.core_shapes``, fp32 or ``weights``' dtype if that is fp64, and the relative error after
        every round.

    Raises:
        SpecError: A shape does not fit the spec.
    """
    if tuple(weights.shape) != (spec.experts, spec.expert_rows, spec.in_features):
        raise SpecError(
            f"weights of shape {tuple(weights.shape)}; needed {spec.experts, spec.expert_rows, spec.in_features}."
        )
    w, count = weights.double(), spec.experts
    p = w.new_full((count,), 1 / count) if shares is None else shares.to(w) / shares.sum()
    c = None if moments is None else moments.to(w)
    problem = _Problem(w, c, p, spec.out_rank)
    basis = torch.eye(spec.in_features).to(w)
    if spec.has_in_basis:
        basis = problem.start(spec.in_rank)
    whole = float(problem.weighed(w).mul(w).sum((1, 2)) @ p) or 1.0
    loss, left, middle = problem.outputs(basis)
    losses = [loss]
    for _ in range(rounds if spec.has_in_basis else 0):
        found = problem.inputs(basis, left, middle)
        loss, *rest = problem.outputs(found)
        if not loss < losses[-1]:
            break
        basis, (left, middle) = found, rest
        losses.append(loss)
    result = torch.float64 if weights.dtype == torch.float64 else torch.float32
    cores = [*([left] if spec.has_out_basis else []), middle, *([basis] if spec.has_in_basis else [])]
    if not spec.has_out_basis:
        cores[0] = left @ middle
    return [core.to(result).contiguous() for core in cores], tuple((max(0.0, e) / whole) ** 0.5 for e in losses)


class _Problem:
    """The problem in U, S and V; arguments as in the module's notation, ``moments`` None for identities."""

    def __init__(self, weights: Tensor, moments: Tensor | None, shares: Tensor, out_rank: int) -> None:
        self.weights, self.moments, self.shares, self.out_rank = weights, moments, shares, out_rank

    def weighed(self, matrices: Tensor) -> Tensor:
        """``M_e C_e``, shape (E, ., n)."""
        return matrices if self.moments is None else matrices @ self.moments

    def start(self, rank: int) -> Tensor:
        """V of the decomposition in the pooled metric, (q, n), rows orthonormal."""
        pooled = None if self.moments is None else torch.einsum("e,eij->ij", self.shares, self.moments)
        into, back = roots(pooled, self.weights[0])
        gram = torch.einsum("e,emi,emj->ij", self.shares, self.weights, self.weights)  # (n, n)
        gram = gram if into is None else into @ gram @ into
        vectors = leading_eigenvectors((gram + gram.mT) / 2, rank)  # (n, q)
        return torch.linalg.qr(vectors if back is None else back @ vectors)[0].mT.contiguous()

    def outputs(self, basis: Tensor) -> tuple[float, Tensor, Tensor]:
        """Error with the best U and S for a given V, (q, n); U (m, p) and S (E, p, q)."""
        inner = self.weighed(basis.expand(len(self.weights), -1, -1)) @ basis.mT  # K, (E, q, q)
        crossed = self.weighed(self.weights) @ basis.mT  # W C Vᵀ, (E, m, q)
        fitted = torch.stack([proximal_step(k, x) for k, x in zip(inner, crossed, strict=True)])  # A, (E, m, q)
        explained = torch.einsum("e,emq,enq->mn", self.shares, fitted, crossed)  # Σ p A K Aᵀ
        left = leading_eigenvectors((explained + explained.mT) / 2, self.out_rank)  # (m, p)
        middle = left.mT @ fitted
        rest = self.weights - left @ middle @ basis
        return float((self.weighed(rest) * rest).sum((1, 2)) @ self.shares), left, middle

    def inputs(self, basis: Tensor, left: Tensor, middle: Tensor) -> Tensor:
        """V (q, n) after conjugate-gradient steps with U and S fixed, rows orthonormal."""
        turned = self.shares[:, None, None] * middle.mT  # p Sᵀ, (E, q, p)
        grams = turned @ middle  # p Sᵀ S, (E, q, q)
        wanted = (turned @ (left.mT @ self.weighed(self.weights))).sum(0)  # (q, n)

        def normal(v: Tensor) -> Tensor:
            return self.weighed(grams @ v).sum(0)

        of_cores = grams.sum(0)
        pooled = None if self.moments is None else torch.einsum("e,eij->ij", self.shares, self.moments)

        def precondition(v: Tensor) -> Tensor:
            v = proximal_step(of_cores, v.mT, -8).mT
            return v if pooled is None else proximal_step(pooled, v, -8)

        found = conjugate_gradients(basis, wanted, normal, precondition, _STEPS)
        return torch.linalg.qr(found.mT)[0].mT.contiguous()
