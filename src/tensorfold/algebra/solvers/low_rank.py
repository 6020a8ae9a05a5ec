"""Weighted low rank: the matrix Ŵ of rank r with the least ``‖G^½ (W − Ŵ) C^½‖_F``, and that error for every r.

Notation:
    W, Ŵ        matrix to fit and its fit, (out, in)
    C           input moment, (in, in), the identity if not given
    G           gradient moment, (out, out), or (out,) for a diagonal one, the weight of every row; likewise
    U           r leading left singular vectors of G^½ W C^½, (out, r)
    V           its r leading right singular vectors, (in, r)

The optimum is ``G^-½ [G^½ W C^½]_r C^-½`` with ``[·]_r`` the r leading terms of the singular value decomposition
(Eckart–Young). Singular vectors of one side are enough, and those of the smaller side are eigenvectors of a small
matrix:

    Ŵ = G^-½ U Uᵀ G^½ W     U: leading eigenvectors of G^½ W C Wᵀ G^½, (out, out)
    Ŵ = W C^½ V Vᵀ C^-½     V: leading eigenvectors of C^½ Wᵀ G W C^½, (in, in)

Only the moment of the smaller side needs a root and an inverse, and neither where it is the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tensorfold.algebra.solvers.als import is_large_table
from tensorfold.algebra.solvers.als_cg import weigh
from tensorfold.algebra.solvers.ttsvd import balance, leading_eigenvectors, left_basis
from tensorfold.algebra.specs.spec import Spec
from tensorfold.utils.validation import check_floating

_RIDGE = 1e-6  # added to a moment that is inverted, as a part of its mean eigenvalue


def whitened_low_rank(
    weight: Tensor, input_moment: Tensor | None, spec: Spec, gradient_moment: Tensor | None = None
) -> list[Tensor]:
    """Matrix of rank r with the least ``‖G^½ (W − Ŵ) C^½‖``, as two cores.

    Without G it is the optimum of SVD-LLM (arXiv 2403.07378), found without its Cholesky factor or any inverse, so that
    it holds for singular C. A moment that has to be inverted gets a ridge, because the error does not determine Ŵ along
    its null space.

    Args:
        weight: W, shape (out, in), any floating dtype.
        input_moment: C, (in, in); the identity if None.
        spec: Modes (out, 1) and (1, in); its one bond is r.
        gradient_moment: G, (out, out) or (out,); the identity if None.

    Returns:
        Cores (1, out, 1, r) and (r, 1, in, 1), fp32 or ``weight``'s dtype if that is fp64, norms spread evenly.
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
    """Squared error ``‖G^½ (W − Ŵ) C^½‖²`` of the best Ŵ of every rank.

    Args:
        weight: W, shape (out, in).
        input_moment: C, (in, in); the identity if None.
        gradient_moment: G, (out, out) or (out,); the identity if None.

    Returns:
        fp64, shape (min(out, in) + 1,), for r = 0 … min(out, in), falling to 0.
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
    """Part of W that a partial spec keeps: the rows and columns with the largest weighted norms.

    Row i has the norm ``(W C Wᵀ)_ii G_ii`` and column j ``(Wᵀ G W)_jj C_jj``. The kept part is a regression on all of
    W, so that it makes up for the others as far as C and G correlate them.

    Args:
        weight: W, shape (out, in).
        spec: Partial; ``spec.inner`` says how many rows and columns are kept.
        input_moment: C, (in, in); the identity if None.
        gradient_moment: G, (out, out) or (out,); the identity if None.

    Returns:
        The kept matrix, (rows, columns), in ``weight``'s dtype; its rows and its columns in W, rising, int64.
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
    """Regression of W on its columns K with the least ``‖(W − Ŵ) C^½‖``: ``W_K + W_D C_DK C_KK⁻¹``, D the others.

    Args:
        weight: W, (p, q).
        kept: K, int64, (k,).
        moment: C, (q, q); the identity if None.
    """
    left = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    left[kept] = False
    if moment is None or not left.any() or not weight[:, left].any():
        return weight[:, kept]
    inner = moment[kept][:, kept]
    ridge = (_RIDGE * inner.diagonal().mean()).clamp_min(torch.finfo(inner.dtype).tiny)  # where all is zero
    inner = inner + ridge * torch.eye(len(kept)).to(inner)
    return weight[:, kept] + torch.linalg.solve(inner, moment[kept][:, left] @ weight[:, left].T).T


def _sandwich(root: Tensor | None, matrix: Tensor) -> Tensor:
    """Product ``R M R`` of square matrices (n, n); M itself where the root R is the identity, None."""
    return matrix if root is None else root @ matrix @ root


def roots(moment: Tensor | None, like: Tensor, ridge: float = _RIDGE) -> tuple[Tensor | None, Tensor | None]:
    """Square root ``M^½`` of a moment and its inverse ``M^−½``, of M's shape, in the dtype of ``like``.

    Args:
        moment: M, (n, n), or (n,) for a diagonal one; None for the identity, whose roots are None as well.
        like: A tensor of the wanted dtype and device.
        ridge: Part of the mean eigenvalue that is added to every eigenvalue.
    """
    if moment is None:
        return None, None
    m = moment.to(like.device).double()
    values, vectors = (m, None) if m.dim() == 1 else torch.linalg.eigh(m)
    values = values.clamp_min(0)
    values = values + (ridge * values.mean()).clamp_min(torch.finfo(values.dtype).tiny)
    roots = (values.sqrt(), values.rsqrt())
    into, back = (root if vectors is None else (vectors * root) @ vectors.T for root in roots)
    return into.to(like), back.to(like)
