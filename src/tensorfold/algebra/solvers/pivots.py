"""Interpolative decomposition: a low-rank matrix by some of its own rows, the pivots, and how the others mix them.

    W = U V,   W[order] = [I; T] S

Notation:
    W           matrix of rank r, (out, in)
    U, V        its factors, (out, r) and (r, in)
    S           pivots, r rows of W, (r, in)
    T           coefficients of the other rows, (out − r, r)
    order       rows of W: the pivots, then the others, (out,)

The factors U (out, r) and V (r, in) of a matrix of rank r hold r² numbers too many: ``U R⁻¹ · R V`` is the same matrix
for every invertible R. Choosing R so that r rows of U become the identity leaves ``r · (out + in - r)`` numbers, the
dimension of the manifold of such matrices, and as many multiply–adds. Any r independent rows would do; those that QR
with column pivoting finds keep T small (Cheng, Gimbutas, Martinsson & Rokhlin, SIAM J. Sci. Comput. 26, 2005). As a
layer: PIFA, arXiv 2501.19090.

Columns in g groups that share a basis B (r, in / g), ``W = A (I_g ⊗ B)``, have the same freedom: W is also
``A (I_g ⊗ R⁻¹) · (I_g ⊗ R B)``. There r columns of B become the identity. Groups of rows are treated as the transpose.
"""

from __future__ import annotations

from collections.abc import Sequence

import scipy.linalg
import torch
from torch import Tensor

from tensorfold.algebra.specs.spec import Spec


def with_pivots(cores: Sequence[Tensor], among: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
    """Rewrite ``U V`` as ``[I; T] S`` by reordering its rows; the matrix does not change.

    Args:
        cores: U and V as cores of a low-rank spec, (1, out, 1, r) and (r, 1, in, 1), both of full rank r.
        among: Rows that may become pivots, int64, at least r of them; None for all.

    Returns:
        ``[I; T]`` and S as cores of these shapes, whose product is ``W[order]``; and ``order``, int64, (out,): the
        pivots, then the other rows, each in their own order.
    """
    left, right = cores[0][0, :, 0].double(), cores[1][:, 0, :, 0].double()  # (out, r), (r, in)
    q, _ = torch.linalg.qr(left)  # (out, r)
    open_to_choice = q if among is None else q[among]
    _, found = scipy.linalg.qr(open_to_choice.T.cpu().numpy(), mode="r", pivoting=True, check_finite=False)
    rank = left.shape[1]
    chosen = torch.from_numpy(found[:rank].astype("int64")).to(left.device)
    pivots = (chosen if among is None else among.to(chosen)[chosen]).sort().values
    others = torch.ones(len(left), dtype=torch.bool, device=left.device)
    others[pivots] = False
    order = torch.cat([pivots, others.nonzero()[:, 0]])
    mixed = torch.linalg.solve(q[pivots], q[others], left=False)  # T = Q₂ Q₁⁻¹, (out − r, r)
    top = torch.cat([torch.eye(rank, dtype=left.dtype, device=left.device), mixed])
    rows = left[pivots] @ right
    return [top[None, :, None, :].to(cores[0]), rows[:, None, :, None].to(cores[1])], order


def with_pivots_in_basis(cores: Sequence[Tensor], spec: Spec) -> tuple[list[Tensor], Tensor]:
    """Rewrite the basis B that groups of columns (or rows) share as ``[I, T]`` by reordering within every group.

    Args:
        cores: A and B for groups of columns, (1, out, groups, r) and (r, 1, width, 1), B of full rank r; for groups of
            rows with their two middle axes exchanged.
        spec: Theirs.

    Returns:
        Cores of these shapes for ``W[:, order]``, or ``W[order]``; and ``order``, int64, (groups · width,): within
        every group the pivots, then its other columns or rows.
    """
    if spec.grouped == "out":
        turned, order = with_pivots_in_basis([core.transpose(1, 2) for core in cores], spec.transposed)
        return [core.transpose(1, 2) for core in turned], order
    (_, _, groups, rank), width = cores[0].shape, cores[1].shape[2]
    basis = cores[1].reshape(1, rank, width).transpose(1, 2)[:, :, None]  # (1, width, 1, r), a factor of low rank
    change = torch.eye(rank, dtype=basis.dtype, device=basis.device)[:, None, :, None]
    (top, rows), order = with_pivots([basis, change])
    # A R⁻¹ in every group: (1, out, groups, r) with rows (r, 1, r, 1).
    left = torch.einsum("aogr,sbrc->aogs", cores[0].double(), rows.double()).to(cores[0])
    starts = torch.arange(groups, device=order.device)[:, None] * width
    return [left, top.permute(3, 0, 1, 2).to(cores[1])], (starts + order).flatten()
