"""Solving for one factor with the others fixed: moments made definite, regressions with a ridge, conjugate gradients.

Notation:
    C           second moment, the mean of x xᵀ over vectors x, (n, n)
    H           normal matrix of a least-squares problem, symmetric positive semidefinite, (k, k)
    R           residual of the normal equations X H = B at the current X: B − X H, (p, k)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tensorfold.errors import SpecError

INDEFINITE = "metric is not positive semidefinite; needed a second moment, the mean of x xᵀ over the vectors x."
_ROUNDING = 1e-5  # part of the trace; second moments may have been summed in the precision of bf16 or fp32


def definite(moment: Tensor) -> Tensor:
    """Add to a second moment the multiple of the identity that lifts its eigenvalues above zero; none if not needed.

    A moment summed in fp32 can have eigenvalues a little below zero. Along them an error falls for ever, and a search
    that leaps would follow it to infinity.

    Args:
        moment: C, (n, n).

    Raises:
        SpecError: An eigenvalue is further below zero than rounding explains.
    """
    if not torch.linalg.cholesky_ex(moment).info:
        return moment
    lowest, trace = float(torch.linalg.eigvalsh(moment)[0]), float(moment.trace())
    if lowest < -_ROUNDING * trace:
        raise SpecError(INDEFINITE)
    out = moment.clone()
    out.diagonal().add_(max(0.0, -2 * lowest))
    return out


def proximal_step(normal: Tensor, residual: Tensor, smallest: int = -12) -> Tensor:
    """Regularised Newton step ``R (H + λ D)⁻¹``, (p, k), with D the diagonal of H.

    λ is the first of ``10^smallest``, ``10^(smallest + 2)``, … for which H + λ D has a Cholesky factor. Added to the
    current factor, the step minimises the error plus a pull of weight λ towards that factor, so it lowers the error
    for every λ > 0: no λ has to be right, and directions that a singular H does not see are left alone.

    Args:
        normal: H, shape (k, k).
        residual: R, shape (p, k).
        smallest: Decimal exponent of the smallest λ; never below the precision of the entries.

    Raises:
        SpecError: H is not positive semidefinite.
    """
    # Below the precision of the entries a ridge is none.
    smallest = max(smallest, math.ceil(math.log10(torch.finfo(normal.dtype).eps)))
    scale = normal.diagonal().clamp_min(0).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    scaled = normal / scale / scale[:, None]
    for exponent in range(smallest, 1, 2):
        ridged = scaled.clone()
        ridged.diagonal().add_(10.0**exponent)
        factor, failed = torch.linalg.cholesky_ex(ridged)
        if not failed:
            return torch.cholesky_solve((residual / scale).T, factor).T / scale
    raise SpecError(INDEFINITE)


def conjugate_gradients(
    start: Tensor,
    wanted: Tensor,
    normal: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    steps: int,
) -> Tensor:
    """Preconditioned conjugate-gradient steps for ``H x = b``; each lowers ``½ xᵀ H x − bᵀ x``.

    They end early where the residual is down to rounding, or H has no curvature left along a direction.

    Args:
        start: x to begin with, any shape.
        wanted: b, the same shape.
        normal: x ↦ H x.
        precondition: r ↦ an approximation of H⁻¹ r, symmetric positive definite.
        steps: At most so many.

    Returns:
        x after the steps.
    """
    x, residual = start, wanted - normal(start)
    direction = z = precondition(residual)
    slope = first = (residual * z).sum()
    for _ in range(steps):
        if slope <= torch.finfo(x.dtype).eps ** 2 * first:
            break
        image = normal(direction)
        curvature = (direction * image).sum()
        if curvature <= 0:
            break
        x = x + (slope / curvature) * direction
        residual = residual - (slope / curvature) * image
        z = precondition(residual)
        before, slope = slope, (residual * z).sum()
        direction = z + (slope / before) * direction
    return x
