"""Conjugate gradients for one core of weighted alternating least squares.

Notation:
    W           matrix to fit, (out, in) = (a·m·b, x·n·y)
    X           core, (r, m, n, s)
    left        merged cores left of it, (a, x, r): out modes, in modes, bond
    right       merged cores right of it, (s, b, y)
    E           linear map from X to its matrix, (r, m, n, s) → (a·m·b, x·n·y)
    C           input moment, (x·n·y, x·n·y)
    G           gradient moment, (a·m·b, a·m·b), or (a·m·b,) for a diagonal one

The X with the least ``‖G^½ (W − E(X)) C^½‖`` solves the normal equations

    Eᵀ(G E(X) C) = Eᵀ(G W C)

Their matrix is never formed: it has as many rows as X has numbers, and splits over the output index only where G is a
multiple of the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tensorfold.algebra.solvers.normal_equations import conjugate_gradients, proximal_step

_ITERATIONS = 20


def project(matrix: Tensor, left: Tensor, right: Tensor, m: int, n: int) -> Tensor:
    """Contract a matrix with the merged cores around a site, ``Eᵀ(matrix)``: (a·m·b, x·n·y) → (r, m, n, s).

    Args:
        matrix: Shape (a·m·b, x·n·y).
        left: Merged cores left of the site, (a, x, r).
        right: Merged cores right of it, (s, b, y).
        m: Out mode of the site.
        n: In mode of the site.
    """
    (a, x, r), (s, b, y) = left.shape, right.shape
    t = matrix.reshape(a, m, b, x, n, y)
    if r * b * y <= s * a * x:  # the side that shrinks it more goes first
        return torch.einsum("rmbny,sby->rmns", torch.einsum("axr,ambxny->rmbny", left, t), right)
    return torch.einsum("axr,amxns->rmns", left, torch.einsum("ambxny,sby->amxns", t, right))


def expand(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Matrix of a core between its merged neighbours, ``E(core)``: (r, m, n, s) → (a·m·b, x·n·y).

    Args:
        core: Shape (r, m, n, s).
        left: Merged cores left of it, (a, x, r).
        right: Merged cores right of it, (s, b, y).
    """
    (a, x, _), (_, b, y), (_, m, n, _) = left.shape, right.shape, core.shape
    if a * x <= b * y:
        out = torch.einsum("amxns,sby->ambxny", torch.einsum("axr,rmns->amxns", left, core), right)
    else:
        out = torch.einsum("axr,rmbny->ambxny", left, torch.einsum("rmns,sby->rmbny", core, right))
    return out.reshape(a * m * b, x * n * y)


def weigh(matrix: Tensor, input_moment: Tensor | None, gradient_moment: Tensor | None) -> Tensor:
    """Product ``G M C``, shape (out, in).

    Args:
        matrix: M, (out, in).
        input_moment: C, (in, in); the identity if None.
        gradient_moment: G, (out, out), or (out,) for a diagonal one; the identity if None.
    """
    if input_moment is not None:
        matrix = matrix @ input_moment
    if gradient_moment is None:
        return matrix
    return gradient_moment[:, None] * matrix if gradient_moment.dim() == 1 else gradient_moment @ matrix


def improve_core(
    core: Tensor,
    wanted: Tensor,
    left: Tensor,
    right: Tensor,
    input_moment: Tensor | None,
    gradient_moment: Tensor | None = None,
) -> Tensor:
    """Core (r, m, n, s) after a few preconditioned conjugate-gradient steps from the given one; each lowers the error.

    The preconditioner is the Kronecker product of the normal matrix's marginals on the core's four axes: exact where
    the core spans all inputs and outputs.

    Args:
        core: X to start from, (r, m, n, s).
        wanted: Right-hand side ``Eᵀ(G W C)``, (r, m, n, s).
        left: Merged cores left of it, (a, x, r).
        right: Merged cores right of it, (s, b, y).
        input_moment: C, (x·n·y, x·n·y), the identity if None.
        gradient_moment: G, (a·m·b, a·m·b), or (a·m·b,) for a diagonal one; the identity if None.
    """
    _, m, n, _ = core.shape
    inverses = _marginal_inverses(left, right, input_moment, gradient_moment, m, n)

    def normal(v: Tensor) -> Tensor:
        return project(weigh(expand(v, left, right), input_moment, gradient_moment), left, right, m, n)

    return conjugate_gradients(core, wanted, normal, lambda v: _precondition(v, inverses), _ITERATIONS)


def _marginal_inverses(
    left: Tensor, right: Tensor, input_moment: Tensor | None, gradient_moment: Tensor | None, m: int, n: int
) -> tuple[Tensor, ...]:
    """Inverses of the normal matrix's marginals on axes r, m, n and s, (r, r) … (s, s); vectors where diagonal."""
    (a, x, _), (_, b, y) = left.shape, right.shape
    on_left, on_core, on_right = _marginals(input_moment, (x, n, y), left)
    to_left, to_core, to_right = _marginals(gradient_moment, (a, m, b), left)
    grams = (
        torch.einsum("axr,axR->rR", left, _on_sides(left, to_left, on_left)),
        to_core,
        on_core,
        torch.einsum("bys,byS->sS", right.permute(1, 2, 0), _on_sides(right.permute(1, 2, 0), to_right, on_right)),
    )
    return tuple(_inverse(gram) for gram in grams)


def _inverse(gram: Tensor) -> Tensor:
    """Inverse of a semidefinite matrix (n, n), or of a diagonal one (n,), up to its scale; regularised if singular."""
    # A preconditioner may have any scale; each marginal is brought to mean 1, since a product of four may leave fp32.
    gram = gram / (gram if gram.dim() == 1 else gram.diagonal()).mean().clamp_min(torch.finfo(gram.dtype).tiny)
    if gram.dim() == 1:
        return torch.where(gram > 0, 1 / gram, torch.ones_like(gram))
    return proximal_step(gram, torch.eye(len(gram), dtype=gram.dtype, device=gram.device), -8)


def _precondition(core: Tensor, inverses: tuple[Tensor, ...]) -> Tensor:
    """Product of a core (r, m, n, s) with one matrix, or vector, on each of its four axes."""
    for axis, inverse in enumerate(inverses):
        core = _on_axis(core, inverse, axis)
    return core


def _on_axis(tensor: Tensor, moment: Tensor, axis: int) -> Tensor:
    """Product of one axis of a tensor with a symmetric matrix, or with a diagonal one given as a vector."""
    if moment.dim() == 1:
        return tensor * moment.reshape(-1, *([1] * (tensor.dim() - 1 - axis)))
    return torch.tensordot(moment, tensor, dims=([1], [axis])).movedim(0, axis)


def _marginals(moment: Tensor | None, sizes: tuple[int, int, int], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Partial traces of a moment over a three-part index (p, q, t): (p, p), (q, q), (t, t), or vectors if diagonal.

    Args:
        moment: Shape (p·q·t, p·q·t) or (p·q·t,); the identity if None.
        sizes: p, q and t.
        like: A tensor of the dtype and device of the result.
    """
    if moment is None:
        moment = like.new_ones(1).expand(sizes[0] * sizes[1] * sizes[2])
    if moment.dim() == 1:
        parts = moment.reshape(sizes)
        return parts.sum((1, 2)), parts.sum((0, 2)), parts.sum((0, 1))
    parts = moment.reshape(*sizes, *sizes)
    return (
        torch.einsum("xnyXny->xX", parts),
        torch.einsum("xnyxNy->nN", parts),
        torch.einsum("xnyxnY->yY", parts),
    )


def _on_sides(factor: Tensor, gradient_moment: Tensor, input_moment: Tensor) -> Tensor:
    """Merged cores (out, in, bond) times G's marginal on the out axis and C's on the in axis."""
    return _on_axis(_on_axis(factor, gradient_moment, 0), input_moment, 1)
