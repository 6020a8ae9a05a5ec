"""Bond spectra of a matrix product operator: the singular values of its unfoldings, from the cores alone.

At bond k the operator is cut into the sites before it and those after it. The singular values of that unfolding
(Oseledets, SIAM J. Sci. Comput. 33, 2011) are those of ``R_left R_rightᵀ``, a matrix of the bond's size, with R the
triangular factors of the two halves. For low rank they are the singular values of the matrix itself, for a sum of
Kronecker products the weights of its orthogonal terms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def bond_spectra(cores: Sequence[Tensor]) -> list[Tensor]:
    """Singular values of the unfolding at every interior bond.

    Args:
        cores: Shapes (left bond, out mode, in mode, right bond), the outer bonds 1.

    Returns:
        One fp64 vector a bond, largest value first, of at most the bond's size; an empty list for one site.
    """
    chain = [core.double() for core in cores]
    left, right = [], []
    state = torch.ones(1, 1, dtype=torch.float64)
    for core in chain[:-1]:
        state = _triangle(torch.einsum("ar,rmns->amns", state, core).reshape(-1, core.shape[3]))  # of (a·m·n, s)
        left.append(state)  # (≤ s, s)
    state = torch.ones(1, 1, dtype=torch.float64)
    for core in reversed(chain[1:]):
        state = _triangle(torch.einsum("rmns,as->rmna", core, state).reshape(core.shape[0], -1).T)  # of (m·n·a, r)
        right.append(state)  # (≤ r, r)
    return [torch.linalg.svdvals(a @ b.T) for a, b in zip(left, reversed(right), strict=True)]


def _triangle(matrix: Tensor) -> Tensor:
    """Triangular factor R of the QR decomposition of a matrix (p, q): (min(p, q), q)."""
    return torch.linalg.qr(matrix, mode="r").R
