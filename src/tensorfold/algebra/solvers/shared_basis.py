"""Groups of columns, or rows, that share a basis, fitted in both metrics faster than by general sweeps.

    Ŵ = A (I_g ⊗ B)        or its transpose

B (r, in / g) is the basis and A (out, g r) how every group uses it: the sum ``Σ_k A_k ⊗ b_kᵀ``. A has a row for every
output, so for a given B the best one is a regression that does not depend on G:

    A = W C Fᵀ (F C Fᵀ)⁻¹        F = I_g ⊗ B

What is left is a problem in B alone, with ``G^½ W`` in W's place and no G. A and B are improved in turn, A by that
formula and B by conjugate gradients, whose normal matrix ``Σ_xy (A_xᵀ A_y) ⊗ C_xy`` over pairs of groups is applied at
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

_STEPS = 12  # of conjugate gradients in a round
_PATIENCE = 3  # rounds


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
    """Cores with a small ``‖G^½ (W − Ŵ) C^½‖``; the error never rises from round to round.

    A round starts from a leap along the step of the last one, which is taken back where it does not help. Three rounds
    that together gain less than ``tolerance`` of the error end the search. Nothing is random.

    Args:
        weight: W, shape (out, in), any floating dtype.
        spec: Modes (out, 1) and (groups, in / groups), or (groups, out / groups) and (in, 1); no padding or scalars.
        input_moment: C, (in, in), symmetric positive semidefinite; the identity if None.
        gradient_moment: G, (out, out), likewise, or (out,), the weight of every row; the identity if None.
        start: Cores to start from instead of the TT-SVD; only the basis counts.
        rounds: At most so many.

    Returns:
        Cores of shapes ``spec.core_shapes``, fp32 or ``weight``'s dtype if that is fp64, and the relative errors.

    Raises:
        SpecError: The spec has other modes, a shape does not fit it, an input holds NaN or infinity, or the metric is
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
    left = problem.regression(w, basis)  # of W itself: the same basis serves it and G^½ W
    result = torch.float64 if weight.dtype == torch.float64 else torch.float32
    groups, rank = spec.in_modes[0], spec.ranks[0]
    cores = [left.reshape(1, -1, groups, rank), basis[:, None, :, None]]
    cores = [core.transpose(1, 2) for core in cores] if turned else cores
    return Fit([core.to(result).contiguous() for core in cores], tuple((max(0.0, e) / whole) ** 0.5 for e in losses))


class _Problem:
    """``min ‖(T − A (I ⊗ B)) C^½‖`` for T (p, in)."""

    def __init__(self, target: Tensor, input_moment: Tensor, groups: int) -> None:
        self.target, self.input_moment, self.groups = target, input_moment, groups

    def regression(self, target: Tensor, basis: Tensor) -> Tensor:
        """The best A, (p, g r)."""
        rows = torch.block_diag(*[basis] * self.groups)
        weighed = rows @ self.input_moment
        return proximal_step(weighed @ rows.T, target @ weighed.T)

    def round(self, basis: Tensor) -> tuple[float, Tensor]:
        """B after one step of each, orthonormal but for that step, and the loss with the best A for it."""
        u, _, v = torch.linalg.svd(basis, full_matrices=False)  # polar, so that bases of successive rounds are near
        basis = self._solve(u @ v, self.regression(self.target, u @ v))
        rest = self.target - self.regression(self.target, basis) @ torch.block_diag(*[basis] * self.groups)
        return float(((rest @ self.input_moment) * rest).sum()), basis

    def _solve(self, basis: Tensor, left: Tensor) -> Tensor:
        """Preconditioned conjugate gradients from ``basis``; each step lowers the loss."""
        g, (rank, width) = self.groups, basis.shape
        gram = (left.T @ left).reshape(g * rank, g, rank)
        input_moment = self.input_moment.reshape(g * width, g, width)

        def normal(v: Tensor) -> Tensor:
            mixed = torch.einsum("agk,kx->agx", gram, v).reshape(g, rank, g * width)
            return torch.einsum("gkn,ngx->kx", mixed, input_moment)

        wanted = torch.einsum("gkgx->kx", (left.T @ (self.target @ self.input_moment)).reshape(g, rank, g, width))
        of_terms = torch.einsum("gkgl->kl", gram.reshape(g, rank, g, rank))
        of_width = torch.einsum("gxgy->xy", input_moment.reshape(g, width, g, width))

        def precondition(v: Tensor) -> Tensor:
            return proximal_step(of_width, proximal_step(of_terms, v.T, -8).T, -8)

        return conjugate_gradients(basis, wanted, normal, precondition, _STEPS)
