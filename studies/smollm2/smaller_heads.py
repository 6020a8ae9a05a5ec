"""Values and outputs of attention with smaller heads: what the basis of a value head is free for.

The output of a block's attention is ``Σ_h O_h z_h``, ``z_h`` a mean over positions of ``V_k x``, k the key–value head
of h. Any invertible R (d, d) turns ``V_k`` to ``R V_k`` and its ``O_h`` to ``O_h R⁻¹`` and changes nothing, so d²
numbers of each key–value head need not be stored. And E (d', d) with ``O'_h E ≈ O_h``, the best in the metrics of what
``o_proj`` reads and of the loss's gradient, leaves smaller heads: ``V'_k = E V_k``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from grouped import Grouped, Problem, root
from torch import Tensor

from tensorfold.algebra.solvers.low_rank import error_curve

HEADS, KV_HEADS, ROUNDS = 9, 3, 5


@dataclass(frozen=True)
class Heads:
    """Values and outputs of a block whose heads have ``size`` dimensions left, in the basis that keeps most."""

    v: tuple[Tensor, Tensor, Tensor]
    o: tuple[Tensor, Tensor]  # and C
    lost: float  # in the metric of the outputs

    @classmethod
    def of(cls, wv: Tensor, cv: Tensor, gv: Tensor, wo: Tensor, co: Tensor, go: Tensor, size: int) -> Heads:
        wv, cv, gv, wo, co, go = (tensor.double() for tensor in (wv, cv, gv, wo, co, go))
        whole, labels = len(wv) // KV_HEADS, torch.arange(HEADS) // (HEADS // KV_HEADS)
        parts, each = wo.reshape(-1, HEADS, whole), torch.arange(HEADS)
        inner = torch.einsum("phx,pq,qhy->hxy", parts, go, parts)
        inner = torch.stack([inner[labels == k].sum(0) for k in range(KV_HEADS)])  # (kv, d, d)
        moments = co.reshape(HEADS, whole, HEADS, whole)[each, :, each]
        moments = torch.stack([moments[labels == k].mean(0) for k in range(KV_HEADS)])
        into = torch.stack([root(moment) for moment in moments])
        vectors = torch.linalg.eigh(into @ inner @ into).eigenvectors[..., -size:]
        problem = Problem.of(wo, co, go)
        fitted = Grouped(problem, labels, (vectors.mT @ torch.linalg.inv(into)).float())
        lost, _ = fitted.improve(0, ROUNDS)
        e = fitted.basis.double()
        back = moments @ e.mT @ torch.linalg.inv(e @ moments @ e.mT)  # (kv, d, size)
        rows, columns = torch.block_diag(*e), torch.block_diag(*back)
        rows_o = fitted.expanded().double()
        weights = torch.linalg.solve(rows_o @ co @ rows_o.T, rows_o @ co @ wo.T).T
        return cls((rows @ wv, cv, columns.T @ gv @ columns), (weights, rows_o @ co @ rows_o.T), lost)

    def divided(self, outputs: Tensor, parameters: float, shared: bool) -> tuple[float, int, int]:
        """The least loss in nats² of low rank with pivots on both, and their ranks; ``shared``: the basis is free."""
        (v, c, g), (o, inner) = self.v, self.o
        of_v, of_o = error_curve(v, c, g), error_curve(o, inner, outputs)
        (rows, width), size, found = v.shape, len(v) // KV_HEADS, []
        for rank in range(1, rows + 1):
            paid = rank * (rows + width - rank) - shared * KV_HEADS * size * min(size, rank)
            other = Problem(o, inner, o.shape[0]).rank(parameters - paid) if paid < parameters else 0
            found.append((self.lost + float(of_v[rank] + of_o[min(other, len(of_o) - 1)]), rank, other))
        return min(found)
