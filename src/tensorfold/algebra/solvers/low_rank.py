"""Low rank in the metrics of inputs and outputs: the best matrix of a rank, and the error of every rank.

The matrix Ŵ of rank r with the smallest ``‖G^½ (W − Ŵ) C^½‖`` is ``G^-½ [G^½ W C^½]_r C^-½``, with ``[·]_r`` the r
leading terms of the singular value decomposition. One side's singular vectors are enough, and those of the smaller side
are eigenvectors of a small matrix:

    Ŵ = G^-½ U Uᵀ G^½ W     U: of G^½ W C Wᵀ G^½,  (out, out)
    Ŵ = W C^½ V Vᵀ C^-½     V: of C^½ Wᵀ G W C^½,  (in, in)

Only the metric of that side needs a root, and an inverse only where the identity does not stand in its place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tensorfold.algebra.solvers.als import is_large_table
from tensorfold.algebra.solvers.als_cg import weigh
from tensorfold.algebra.solvers.ttsvd import balance, leading_eigenvectors, left_basis
from tensorfold.algebra.specs.spec import Spec
from tensorfold.utils.validation import check_floating

_RIDGE = 1e-6  # of its mean eigenvalue, added to a metric that is inverted


def whitened_low_rank(
    weight: Tensor, input_moment: Tensor | None, spec: Spec, gradient_moment: Tensor | None = None
) -> list[Tensor]:
    """The rank-r matrix with the smallest ``‖G^½ (W − Ŵ) C^½‖``, as cores.

    Without G it is the optimum of SVD-LLM (arXiv 2403.07378) without its Cholesky factor or any inverse, so it holds
    for singular C. A singular metric that has to be inverted gets a ridge: what it does not weigh is not determined.
    """
    check_floating(weight=weight)
    result = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
    w = weight.to(torch.float32 if is_large_table(weight, gradient_moment) else torch.float64)
    c = None if input_moment is None else input_moment.to(w)
    rank = spec.ranks[0]
    if w.shape[0] > w.shape[1] and gradient_moment is not None and gradient_moment.dim() == 2:
        into, back = roots(input_moment, w)
        basis = leading_eigenvectors(_sandwich(into, w.T @ weigh(w, None, gradient_moment.to(w))), rank)
        right = basis.T if back is None else basis.T @ back
        left = w @ (basis if into is None else into @ basis)
    else:
        into, back = roots(gradient_moment, w)
        w = weigh(w, None, into)
        if w.shape[0] <= w.shape[1]:
            basis = leading_eigenvectors(weigh(w, c, None) @ w.T, rank)
        elif input_moment is None:
            basis = left_basis(w, rank)
        else:
            values, vectors = torch.linalg.eigh(input_moment.double())
            basis = left_basis(w @ (vectors * values.clamp_min(0).sqrt()).to(w), rank)
        left, right = weigh(basis, None, back), basis.T @ w
    return [core.to(result) for core in balance([left[None, :, None, :], right[:, None, :, None]])]  # (out, r), (r, in)


def error_curve(weight: Tensor, input_moment: Tensor | None = None, gradient_moment: Tensor | None = None) -> Tensor:
    """``‖G^½ (W − Ŵ) C^½‖²`` of the best Ŵ of every rank r = 0 … min(out, in); fp64, falling to 0.

    Args:
        weight: Shape (out, in).
        input_moment: C, (in, in).
        gradient_moment: G, (out, out).
    """
    check_floating(weight=weight)
    w = weight.double()
    c, g = (None if given is None else given.to(w) for given in (input_moment, gradient_moment))
    if w.shape[0] <= w.shape[1]:
        gram = _sandwich(roots(g, w, ridge=0.0)[0], weigh(w, c, None) @ w.T)
    else:
        gram = _sandwich(roots(c, w, ridge=0.0)[0], w.T @ weigh(w, None, g))
    energies = torch.linalg.eigvalsh(gram).clamp_min(0).cpu()  # rising
    return torch.cat([energies.new_zeros(1), energies.cumsum(0)]).flip(0)


def restricted(
    weight: Tensor, spec: Spec, input_moment: Tensor | None = None, gradient_moment: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The matrix that a partial spec keeps of ``weight``, on its rows and columns of the largest norms in the metrics.

    By regression it makes up, as far as the metrics let it, for the rows and columns that are left out.

    Returns:
        Shape (rows, columns), in ``weight``'s dtype; and the indices of both, rising, int64.
    """
    w = weight.double()
    c, g = (None if given is None else given.to(w) for given in (input_moment, gradient_moment))
    rows = (weigh(w, c, None) * w).sum(1)
    columns = (weigh(w, None, g) * w).sum(0)
    rows = rows if g is None else rows * (g if g.dim() == 1 else g.diagonal())
    columns = columns if c is None else columns * c.diagonal()
    rows, columns = (
        norms.topk(size).indices.sort().values
        for norms, size in ((rows, spec.inner.out_features), (columns, spec.inner.in_features))
    )
    w = _regressed(w, columns, c)
    w = _regressed(w.T, rows, None if g is None or g.dim() == 1 else g).T
    return w.to(weight.dtype), rows, columns


def _regressed(weight: Tensor, kept: Tensor, moment: Tensor | None) -> Tensor:
    """Columns ``kept``, and what they give of the others: ``W_K + W_D C_DK C_KK⁻¹``."""
    left = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    left[kept] = False
    if moment is None or not left.any() or not weight[:, left].any():
        return weight[:, kept]
    inner = moment[kept][:, kept]
    ridge = (_RIDGE * inner.diagonal().mean()).clamp_min(torch.finfo(inner.dtype).tiny)  # where all is zero
    inner = inner + ridge * torch.eye(len(kept)).to(inner)
    return weight[:, kept] + torch.linalg.solve(inner, moment[kept][:, left] @ weight[:, left].T).T


def _sandwich(root: Tensor | None, matrix: Tensor) -> Tensor:
    return matrix if root is None else root @ matrix @ root


def roots(moment: Tensor | None, like: Tensor, ridge: float = _RIDGE) -> tuple[Tensor | None, Tensor | None]:
    """``M^½`` and its inverse; vectors where the metric is diagonal, None where it is the identity."""
    if moment is None:
        return None, None
    m = moment.to(like.device).double()
    values, vectors = (m, None) if m.dim() == 1 else torch.linalg.eigh(m)
    values = values.clamp_min(0)
    values = values + (ridge * values.mean()).clamp_min(torch.finfo(values.dtype).tiny)
    roots = (values.sqrt(), values.rsqrt())
    into, back = (root if vectors is None else (vectors * root) @ vectors.T for root in roots)
    return into.to(like), back.to(like)
