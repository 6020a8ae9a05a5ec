"""Alternating least squares for groups of columns, or rows, that share a basis; faster than sweeps over general cores.

    Ŵ = A (I_g ⊗ B)        or its transpose

Notation:
    W, Ŵ        matrix to fit and its fit, (out, in), with the least ``‖G^½ (W − Ŵ) C^½‖``
    g           number of groups, of in / g columns each
    B           basis that all groups share, (r, in / g)
    A           coefficients, (out, g·r); A_x (out, r) are those of group x
    F           I_g ⊗ B, (g·r, in)
    C           input moment, (in, in); C_xy (in / g, in / g) its block for groups x and y
    G           gradient moment, (out, out), or (out,) for a diagonal one
    T           G^½ W, or the triangular factor of its QR decomposition where that is smaller, (p, in)

A has a row for every output, so for a given B the best A is a regression that does not depend on G:

    A = W C Fᵀ (F C Fᵀ)⁻¹

What is left is a problem in B alone, with T in W's place and no G. A and B are improved in turn, A by that formula and
B by conjugate gradients, whose normal matrix ``Σ_xy (A_xᵀ A_y) ⊗ C_xy`` over pairs of groups is applied at
``in · r · (in + g r)`` multiply–adds, against ``out · in · (out + in)`` where every core is expanded to the matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tensorfold.algebra.solvers.als import Fit, check_gradient_moment, check_input_moment
from tensorfold.algebra.solvers.als_cg import weigh
from tensorfold.algebra.solvers.low_rank import roots
from tensorfold.algebra.solvers.normal_equations import conjugate_gradients, definite, proximal_step
from tensorfold.algebra.solvers.ttsvd import check_weight, tt_svd
from tensorfold.algebra.specs.spec import Spec
from tensorfold.errors import SpecError

_STEPS = 12  # conjugate-gradient steps of a round
_PATIENCE = 3  # rounds that together have to gain something


def fit_shared_basis(
    weight: Tensor,
    spec: Spec,
    input_moment: Tensor | None = None,
    gradient_moment: Tensor | None = None,
    start: list[Tensor] | None = None,
    *,
    rounds: int = 20,
    tolerance: float = 1e-4,
) -> Fit:
    """Fit A and B in turn, which lowers ``‖G^½ (W − Ŵ) C^½‖``; the error never rises from round to round.

    A round starts from a leap along the step of the last one, which is taken back where it does not help. Three rounds
    that together gain less than ``tolerance`` of the error end the search. Nothing is random.

    Args:
        weight: W, shape (out, in), any floating dtype.
        spec: Modes (out, 1) and (groups, in / groups), or (groups, out / groups) and (in, 1); no padding or scalars.
        input_moment: C, (in, in), symmetric positive semidefinite; the identity if None.
        gradient_moment: G, (out, out), likewise, or (out,), the weight of every row; the identity if None.
        start: Cores to start from instead of the TT-SVD; only the basis counts.
        rounds: At most so many.
        tolerance: Relative gain in error that three rounds together must reach for the search to go on.

    Returns:
        Cores of shapes ``spec.core_shapes``, fp32 or ``weight``'s dtype if that is fp64, and the relative errors.

    Raises:
        SpecError: The spec has other modes, a shape does not fit it, an input holds NaN or infinity, or a moment is
            not positive semidefinite.
    """
    if spec.grouped is None or spec.is_padded or spec.scalars:
        raise SpecError(
            f"fit_shared_basis: got {spec}; needed modes (out, 1) and (groups, in / groups), or (groups, out / groups) "
            "and (in, 1), without padding or scalars."
        )
    w = check_weight(weight, spec).double()
    c = None if input_moment is None else check_input_moment(input_moment, spec).to(w)
    g = None if gradient_moment is None else check_gradient_moment(gradient_moment, spec).to(w)
    turned = spec.grouped == "out"
    if turned:
        w, c, g, spec = w.T, g, c, spec.transposed
        start = None if start is None else [core.transpose(1, 2) for core in start]
    if c is None or c.dim() == 1:
        c = torch.diag(w.new_ones(spec.in_features) if c is None else c)
    c = definite(c)
    root = roots(g, w, ridge=0.0)[0]
    target = weigh(w, None, root)
    if len(target) > target.shape[1]:
        target = torch.linalg.qr(target).R
    basis = (start or tt_svd(w, spec))[1].to(w)[:, 0, :, 0]  # (r, in / g)
    whole = float(weigh(target, c, None).mul(target).sum()) or 1.0
    problem = _Problem(target, c, spec.in_modes[0])
    loss, basis = problem.round(basis)
    losses, step, stride = [loss], None, 1.0
    for _ in range(rounds - 1):
        before = basis
        found = None if step is None else problem.round(before + stride * step)
        if found is not None and found[0] < losses[-1]:
            stride *= 1.5
        else:
            found, stride = problem.round(before), stride / 2
        if not found[0] < losses[-1]:  # down to rounding
            break
        basis, step = found[1], found[1] - before
        losses.append(found[0])
        if len(losses) > _PATIENCE and losses[-1] > (1 - tolerance) ** 2 * losses[-1 - _PATIENCE]:
            break
    left = problem.regression(w, basis)  # A of W itself, (out, g·r): one basis serves W and G^½ W
    result = torch.float64 if weight.dtype == torch.float64 else torch.float32
    groups, rank = spec.in_modes[0], spec.ranks[0]
    cores = [left.reshape(1, -1, groups, rank), basis[:, None, :, None]]
    cores = [core.transpose(1, 2) for core in cores] if turned else cores
    return Fit([core.to(result).contiguous() for core in cores], tuple((max(0.0, e) / whole) ** 0.5 for e in losses))


class _Problem:
    """The problem ``min ‖(T − A F) C^½‖²`` in A and B.

    Args:
        target: T, (p, in).
        input_moment: C, (in, in).
        groups: g.
    """

    def __init__(self, target: Tensor, input_moment: Tensor, groups: int) -> None:
        self.target, self.input_moment, self.groups = target, input_moment, groups

    def regression(self, target: Tensor, basis: Tensor) -> Tensor:
        """Regression ``A = T C Fᵀ (F C Fᵀ)⁻¹`` of a matrix T (p, in) on the basis B (r, in / g); (p, g·r)."""
        rows = torch.block_diag(*[basis] * self.groups)  # F, (g·r, in)
        weighed = rows @ self.input_moment  # F C, (g·r, in)
        return proximal_step(weighed @ rows.T, target @ weighed.T)

    def round(self, basis: Tensor) -> tuple[float, Tensor]:
        """One round: A for the orthonormalised B, then B for that A; returns the loss with the best A, and B."""
        u, _, v = torch.linalg.svd(basis, full_matrices=False)  # polar, so that bases of successive rounds are near
        basis = self._solve(u @ v, self.regression(self.target, u @ v))
        rest = self.target - self.regression(self.target, basis) @ torch.block_diag(*[basis] * self.groups)
        return float(((rest @ self.input_moment) * rest).sum()), basis

    def _solve(self, basis: Tensor, left: Tensor) -> Tensor:
        """B (r, in / g) after preconditioned conjugate-gradient steps with A (p, g·r) fixed; each lowers the loss."""
        g, (rank, width) = self.groups, basis.shape
        gram = (left.T @ left).reshape(g * rank, g, rank)  # Aᵀ A
        input_moment = self.input_moment.reshape(g * width, g, width)

        def normal(v: Tensor) -> Tensor:
            mixed = torch.einsum("agk,kx->agx", gram, v).reshape(g, rank, g * width)  # Aᵀ A F
            return torch.einsum("gkn,ngx->kx", mixed, input_moment)  # blocks (g, g) of Aᵀ A F C summed, (r, in / g)

        # Blocks on the diagonal summed over the groups: (r, in / g), (r, r) and (in / g, in / g).
        wanted = torch.einsum("gkgx->kx", (left.T @ (self.target @ self.input_moment)).reshape(g, rank, g, width))
        of_terms = torch.einsum("gkgl->kl", gram.reshape(g, rank, g, rank))
        of_width = torch.einsum("gxgy->xy", input_moment.reshape(g, width, g, width))

        def precondition(v: Tensor) -> Tensor:
            return proximal_step(of_width, proximal_step(of_terms, v.T, -8).T, -8)

        return conjugate_gradients(basis, wanted, normal, precondition, _STEPS)
