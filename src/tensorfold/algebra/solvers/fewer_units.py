"""Fewer hidden units in an MLP: which can go, what that costs, and what the others make up for.

    W (m × h)  the contracting matrix, whose columns are the hidden units     C (h × h)  second moment of its inputs
    K          the units that stay, k of them                                 G (m × m)  gradient moment of its outputs

An MLP whose activation works on each unit by itself computes ``W a`` from the activations a of its units. Without some
of them the best it can do is ``W' a_K`` with ``W' = W C_K C_KK⁻¹`` (regression of all units on those that stay), and
the loss changes by ``‖G^½ (W − W' E_K) C^½‖²``. Units go one by one, each time the one that then costs least: with P
the inverse of C over the units that are left, dropping unit j costs ``w_jᵀ G w_j / P_jj`` and turns W into
``W − w_j P_j / P_jj`` and P into ``P − P_jᵀ P_j / P_jj``. That is optimal brain surgery (Hassibi & Stork 1993) on
columns instead of single weights, in two metrics; Krony-PT's pruned start (every other unit, nothing compensated) is
its plainest relative. The result is a narrower MLP of the same kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tensorfold.algebra.solvers.low_rank import roots

_COMPACT = 64  # eliminations, after which rows and columns of units that are gone are cut out of what is worked on
_RIDGE = 1e-6  # of the mean of a scaled moment's diagonal, added before it is inverted


@dataclass(frozen=True, eq=False)
class Elimination:
    """The order in which hidden units go.

    Attributes:
        order: Units, int64, shape (h − least,): the first goes first.
        losses: Shape (h + 1,), fp64: ``‖G^½ (W − W' E_K) C^½‖²`` with k units left; infinite for k below ``least``.
    """

    order: Tensor
    losses: Tensor

    def kept(self, size: int) -> Tensor:
        """The units that stay when ``size`` do, int64, rising."""
        units = len(self.losses) - 1
        stays = torch.ones(units, dtype=torch.bool)
        stays[self.order[: units - size]] = False
        return stays.nonzero().squeeze(1)


@torch.no_grad()
def eliminate(weight: Tensor, input_moment: Tensor, gradient_moment: Tensor, least: int) -> Elimination:
    """Drop hidden units one by one, each time the one that costs least with the others making up for it.

    Args:
        weight: W, shape (m, h).
        input_moment: C, shape (h, h), symmetric and positive semidefinite.
        gradient_moment: G, shape (m, m), likewise.
        least: How many units stay at least, 1 … h.
    """
    units = weight.shape[1]
    scale = input_moment.double().diagonal().clamp_min(0).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    moment = input_moment.double() / scale.outer(scale)  # unit diagonal: float32 is then enough for what follows
    ridge = _RIDGE * torch.eye(units).to(moment)
    inverse = torch.linalg.inv(moment + ridge).float().contiguous()  # P, (h, h)
    root, _ = roots(gradient_moment, weight.double(), ridge=0.0)
    assert root is not None
    columns = (root @ weight.double() * scale).float().T.contiguous()  # rows are G^½ w_j, (h, m)
    alive = torch.arange(units)
    here = torch.ones(units, dtype=torch.bool, device=inverse.device)  # of those in ``alive``
    losses = torch.full((units + 1,), float("inf"), dtype=torch.float64)
    losses[units] = 0.0
    order = []
    for left in range(units - 1, least - 1, -1):
        diagonal = inverse.diagonal()
        costs = columns.square().sum(1) / diagonal.clamp_min(torch.finfo(torch.float32).tiny)
        j = int(torch.where(here, costs, torch.inf).argmin())
        losses[left] = losses[left + 1] + float(costs[j])
        order.append(int(alive[j]))
        row, own = inverse[j].clone(), columns[j].clone()
        columns.addr_(row, own, alpha=-1 / float(row[j]))
        inverse.addr_(row, row, alpha=-1 / float(row[j]))
        here[j] = False
        columns[j] = 0
        if len(order) % _COMPACT == 0:
            inverse, columns = inverse[here][:, here].contiguous(), columns[here].contiguous()
            alive, here = alive[here.cpu()], here[here]
    return Elimination(torch.tensor(order, dtype=torch.int64), losses)


def compensated(weight: Tensor, input_moment: Tensor, kept: Tensor) -> Tensor:
    """``W' = W C_K C_KK⁻¹``: the contracting matrix of the units that stay, shape (m, k), fp64."""
    c = input_moment.double()
    inner, crossed = c[kept][:, kept], weight.double() @ c[:, kept]  # (k, k), (m, k)
    ridge = (_RIDGE * inner.diagonal().mean()).clamp_min(torch.finfo(torch.float64).tiny)
    return torch.linalg.solve(inner + ridge * torch.eye(len(kept)).to(inner), crossed.T).T


@dataclass(frozen=True, eq=False)
class KeptUnits:
    """Hidden units that stay, as a change of basis like :class:`~.smaller_heads.HeadBasis`: zeros for all others.

    Attributes:
        stays: bool, shape (h,).
    """

    stays: Tensor

    @property
    def size(self) -> int:
        """How many units stay."""
        return int(self.stays.sum())

    def rows(self, matrix: Tensor) -> Tensor:
        """An expanding matrix, or bias, of shape (h, …), with zeros for units that go."""
        stays = self.stays.to(matrix.device)
        return matrix * stays.reshape(-1, *[1] * (matrix.dim() - 1))

    def columns(self, matrix: Tensor) -> Tensor:
        """The contracting matrix, shape (m, h), with zeros for units that go."""
        return matrix * self.stays.to(matrix.device)

    def gradient_moment(self, moment: Tensor) -> Tensor:
        """Gradient moment at the outputs of an expanding matrix, shape (h, h), with zeros for units that go."""
        stays = self.stays.to(moment.device)
        return moment * stays * stays[:, None]

    def to(self, device: torch.device) -> KeptUnits:
        """The same on a device."""
        return KeptUnits(self.stays.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        return {"stays": self.stays.clone()}
