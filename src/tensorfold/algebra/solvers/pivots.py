"""Interpolative decomposition: a low-rank matrix by some of its own rows, the pivots, and how the others mix them.

    U V  =  W,  W[order] = [I; T] S        S (r, in): the pivots, T (out - r, r)

The factors U (out, r) and V (r, in) of a matrix of rank r hold r² numbers too many: ``U R⁻¹ · R V`` is the same matrix
for every invertible R. Choosing R so that r rows of U become the identity leaves ``r · (out + in - r)`` numbers, the
dimension of the manifold of such matrices, and as many multiply–adds. Any r independent rows would do; those that QR
with column pivoting finds keep T small (Cheng, Gimbutas, Martinsson & Rokhlin, SIAM J. Sci. Comput. 26, 2005). As a
layer: PIFA, arXiv 2501.19090.

Groups of columns that share a basis, ``A (I_g ⊗ B)`` with B (r, in / g), are the same matrix for every invertible R in
``A (I_g ⊗ R⁻¹) · (I_g ⊗ R B)``. There r columns of B become the identity. Groups of rows are the transpose of that.
"""

from __future__ import annotations

from collections.abc import Sequence

import scipy.linalg
import torch
from torch import Tensor

from tensorfold.algebra.specs.spec import Spec


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


def with_pivots_in_basis(cores: Sequence[Tensor], spec: Spec) -> tuple[list[Tensor], Tensor]:
    """The same matrix with a basis of its groups that begins with the identity, and the order for it.

    Args:
        cores: Of groups of columns, shapes (1, out, groups, r) and (r, 1, width, 1), the latter of rank r; or of rows.
        spec: Theirs.

    Returns:
        Cores of the same shapes for ``W[:, order]``, or ``W[order]``, and ``order``, int64, (groups · width,): within
        every group the pivots, then its other columns or rows.
    """
    if spec.grouped == "out":
        turned, order = with_pivots_in_basis([core.transpose(1, 2) for core in cores], spec.transposed)
        return [core.transpose(1, 2) for core in turned], order
    (_, _, groups, rank), width = cores[0].shape, cores[1].shape[2]
    basis = cores[1].reshape(1, rank, width).transpose(1, 2)[:, :, None]  # (1, width, 1, r), a factor of low rank
    change = torch.eye(rank, dtype=basis.dtype, device=basis.device)[:, None, :, None]
    (top, rows), order = with_pivots([basis, change])
    left = torch.einsum("aogr,sbrc->aogs", cores[0].double(), rows.double()).to(cores[0])
    starts = torch.arange(groups, device=order.device)[:, None] * width
    return [left, top.permute(3, 0, 1, 2).to(cores[1])], (starts + order).flatten()
