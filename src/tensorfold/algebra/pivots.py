"""Interpolative decomposition: a low-rank matrix by some of its own rows, the pivots, and how the others mix them.

    U V  =  W,  W[order] = [I; T] S        S (r, in): the pivots, T (out - r, r)

The factors U (out, r) and V (r, in) of a matrix of rank r hold r² numbers too many: ``U R⁻¹ · R V`` is the same matrix
for every invertible R. Choosing R so that r rows of U become the identity leaves ``r · (out + in - r)`` numbers, the
dimension of the manifold of such matrices, and as many multiply–adds. Any r independent rows would do; those that QR
with column pivoting finds keep T small (Cheng, Gimbutas, Martinsson & Rokhlin, SIAM J. Sci. Comput. 26, 2005). As a
layer: PIFA, arXiv 2501.19090.
"""

from __future__ import annotations

from collections.abc import Sequence

import scipy.linalg
import torch
from torch import Tensor


def with_pivots(cores: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The same matrix with the identity at the top of its first factor, and the order of rows that this takes.

    Args:
        cores: Of a low-rank spec, shapes (1, out, 1, r) and (r, 1, in, 1); of rank r.

    Returns:
        Cores of the same shapes for ``W[order]``, and ``order``, int64, (out,): the pivots, then the other rows, in
        the order that they had.
    """
    left, right = cores[0][0, :, 0].double(), cores[1][:, 0, :, 0].double()
    q, _ = torch.linalg.qr(left)
    _, found = scipy.linalg.qr(q.T.cpu().numpy(), mode="r", pivoting=True, check_finite=False)
    rank = left.shape[1]
    pivots = torch.from_numpy(found[:rank].astype("int64")).sort().values.to(left.device)
    others = torch.ones(len(left), dtype=torch.bool, device=left.device)
    others[pivots] = False
    order = torch.cat([pivots, others.nonzero()[:, 0]])
    mixed = torch.linalg.solve(q[pivots], q[others], left=False)  # T = Q₂ Q₁⁻¹
    top = torch.cat([torch.eye(rank, dtype=left.dtype, device=left.device), mixed])
    rows = left[pivots] @ right
    return [top[None, :, None, :].to(cores[0]), rows[:, None, :, None].to(cores[1])], order


def with_identity(stored: Tensor) -> Tensor:
    """The first core of a pivoted spec as the algebra knows it, from what is stored of it: shape (1, out, 1, rank)."""
    rank = stored.shape[3]
    identity = torch.eye(rank, dtype=stored.dtype, device=stored.device)
    return torch.cat([identity[None, :, None, :], stored], dim=1)
