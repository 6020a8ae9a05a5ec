"""Weighted alternating least squares: cores of a chain whose matrix Ŵ has the least ``‖G^½ (W − Ŵ) C^½‖_F``.

Notation:
    W, Ŵ        matrix to fit and its fit, (out, in)
    C           input moment, (in, in): the error is then that of the layer's output; the identity if not given
    G           gradient moment, (out, out), or (out,) for a diagonal one, the weight of every row; likewise
    X           core at site k, (r, m, n, s): left bond, out mode, in mode, right bond; indices r, i, j, s below
    L           cores left of site k merged, (I<, J<, r): all out modes there, all in modes, bond
    R           cores right of site k merged, (s, I>, J>)

With all cores but X fixed the objective is quadratic in X. Without G every output index i of X has the same normal
matrix H, because C acts on the inputs alone:

    H[(r j s), (r' j' s')] = Σ C[(j< j j>), (j<' j' j>')] · ΣL[i<,j<,r] L[i<,j<',r'] · ΣR[s,i>,j>] R[s',i>,j>']

and the right-hand side is ``W C`` contracted with L and R. With G, X is solved for by conjugate gradients
(:mod:`.als_cg`). Sources: Holtz, Rohwedder & Schneider, "The Alternating Linear Scheme for Tensor Optimization in the
Tensor Train Format" (2012); for sums of Kronecker products, ProcrustesGPT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorfold.algebra.contraction.apply import to_dense
from tensorfold.algebra.solvers.als_cg import improve_core, project, weigh
from tensorfold.algebra.solvers.normal_equations import INDEFINITE, definite, proximal_step
from tensorfold.algebra.solvers.ttsvd import balance, check_weight
from tensorfold.algebra.specs.spec import Spec
from tensorfold.algebra.statistics import Metrics
from tensorfold.errors import SpecError
from tensorfold.utils.validation import check_types

# H is formed (32 MB in fp64) and factored where every output index has at most this many unknowns r · n · s; beyond
# that, conjugate gradients apply it through the dense matrix, at about out·in² multiply–adds an iteration.
DIRECT_UNKNOWNS = 2048
_PATIENCE = 3  # sweeps: a start often rests on a plateau for one or two
_CHUNK = 2**24  # elements of an intermediate of the normal matrix
TABLE = 2**23  # elements of W from which a matrix with row weights is fitted in fp32


@dataclass(frozen=True)
class Fit:
    """Result of an iterative solver.

    Attributes:
        cores: Shapes ``spec.core_shapes``.
        errors: ``‖G^½ (W − Ŵ) C^½‖ / ‖G^½ W C^½‖`` at the start and after every sweep or round.
    """

    cores: list[Tensor]
    errors: tuple[float, ...]

    @property
    def error(self) -> float:
        """Relative error that the search ended with."""
        return self.errors[-1]


def weighted_als(
    weight: Tensor,
    spec: Spec,
    cores: Sequence[Tensor],
    input_moment: Tensor | None = None,
    gradient_moment: Tensor | None = None,
    *,
    sweeps: int = 20,
    tolerance: float = 1e-4,
) -> Fit:
    """Lower ``‖G^½ (W − Ŵ) C^½‖`` by solving for one core after the other; the error never rises.

    A sweep goes through the chain and back, solving for one core at a time with the others orthogonalised, in fp64
    (large tables in fp32). It is followed by a leap along its own step where that lowers the error further (line search
    extrapolation, Bro 1998). Three sweeps that together gain less than ``tolerance`` of the error end the search.
    Nothing is random. Bond scalars are not fitted: the cores absorb them.

    Args:
        weight: W, shape (out_features, in_features), any floating dtype.
        spec: Shape of the chain.
        cores: Start, shapes ``spec.core_shapes``; the result is a local optimum, so the start matters.
        input_moment: C, shape (in_features, in_features), symmetric positive semidefinite, may be singular; None is the
            identity. Padded columns cost nothing.
        gradient_moment: G, shape (out_features, out_features), symmetric positive semidefinite, or (out_features,), the
            weight of every row; None is the identity. Padded rows cost nothing.
        sweeps: At most so many.
        tolerance: Relative gain in error that three sweeps together must reach for the search to go on.

    Returns:
        Cores with the norm spread evenly over the bonds, fp32 or ``weight``'s dtype if that is fp64, and the errors.

    Raises:
        SpecError: A shape does not fit the spec, an input holds NaN or infinity, or a moment is not positive
            semidefinite.
    """
    w = check_weight(weight, spec).to(torch.float32 if is_large_table(weight, gradient_moment) else torch.float64)
    c = None if input_moment is None else definite(check_input_moment(input_moment, spec).to(w))
    g = None if gradient_moment is None else check_gradient_moment(gradient_moment, spec).to(w)
    g = g if g is None or g.dim() == 1 else definite(g)
    chain = [core.to(w) for core in _check_cores(cores, spec)]
    target = weigh(w, c, g)
    metrics = _padded_metrics(c, g, spec)
    norm = _norm(w, c, g) or 1.0

    def error(chain: list[Tensor]) -> float:
        return _norm(w - to_dense(chain, spec), c, g) / norm

    chain = _right_orthogonal(chain)
    errors = [error(chain)]
    stride = 1.0
    for _ in range(sweeps):
        if errors[-1] == 0.0:
            break
        swept = _sweep(chain, _padded_target(target, chain, spec, metrics), metrics)
        after = error(swept)
        leap = _right_orthogonal([new + stride * (new - old) for new, old in zip(swept, chain, strict=True)])
        beyond = error(leap)
        stride = 2 * stride if beyond < after else stride / 2
        if beyond < after:
            swept, after = leap, beyond
        if not after < errors[-1]:  # down to rounding
            break
        chain = swept
        errors.append(after)
        if len(errors) > _PATIENCE and after > (1 - tolerance) * errors[-1 - _PATIENCE]:
            break
    result = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return Fit([core.to(result).contiguous() for core in balance(chain)], tuple(errors))


def _padded_metrics(c: Tensor | None, g: Tensor | None, spec: Spec) -> Metrics:
    """C and G with zero rows and columns for padding, which then weighs nothing: C (Π n, Π n), G (Π m, Π m) or (Π m,).

    Where G is given, C is not and columns are padded, C is the identity with zeros: conjugate gradients then need no
    bound such as that of :func:`_padded_target`.
    """
    columns = math.prod(spec.in_modes) - spec.in_features
    rows = math.prod(spec.out_modes) - spec.out_features
    if g is not None:
        g = F.pad(g, (0, rows) if g.dim() == 1 else (0, rows, 0, rows))
        if c is None and columns:
            c = torch.eye(spec.in_features, dtype=g.dtype, device=g.device)
    return Metrics(None if c is None else F.pad(c, (0, columns, 0, columns)), g)


def _padded_target(target: Tensor, chain: list[Tensor], spec: Spec, metrics: Metrics) -> Tensor:
    """``W C`` with padding filled in from the chain's current matrix, (Π m, Π n): rows that nobody reads cost nothing.

    Filling in the current values bounds the true error from above and touches it here, so a sweep that lowers the one
    lowers the other (majorisation, as in expectation–maximisation for missing data).

    Args:
        target: ``G W C``, or ``W C`` without G; shape (out, in).
        chain: Current cores.
        spec: Theirs.
        metrics: C and G with padding.
    """
    shape = (math.prod(spec.out_modes), math.prod(spec.in_modes))
    if target.shape == shape:
        return target
    if metrics.gradient_moment is not None:  # padding weighs nothing on either side
        return F.pad(target, (0, shape[1] - target.shape[1], 0, shape[0] - target.shape[0]))
    current = _merge(chain, target)[0, :, :, 0]
    padded = current.clone() if metrics.input_moment is None else current @ metrics.input_moment
    padded[: spec.out_features, : spec.in_features] = target
    return padded


def _sweep(cores: list[Tensor], target: Tensor, metrics: Metrics) -> list[Tensor]:
    """Solve for every core on the way right and again on the way left, the two end cores once each; return new cores.

    Args:
        cores: Right-orthogonal.
        target: ``G W C`` with padding, (Π m, Π n).
        metrics: C and G with padding.
    """
    chain = list(cores)
    last = len(chain) - 1
    for k in range(last):
        chain[k] = _solve(chain, k, target, metrics)
        _orthogonalise(chain, k, +1)
    for k in range(last, 0, -1):
        chain[k] = _solve(chain, k, target, metrics)
        _orthogonalise(chain, k, -1)
    if last == 0:
        chain[0] = _solve(chain, 0, target, metrics)
    return chain


def _right_orthogonal(cores: list[Tensor]) -> list[Tensor]:
    """Cores of an unchanged matrix, of which every one but the first is an isometry from its left bond."""
    chain = list(cores)
    for k in range(len(chain) - 1, 0, -1):
        _orthogonalise(chain, k, -1)
    return chain


def _orthogonalise(chain: list[Tensor], k: int, step: int) -> None:
    """Make core k an isometry towards its neighbour ``k + step`` and multiply the rest into that neighbour, in place.

    The polar decomposition, unlike QR, leaves an isometry as it is, so that the cores of successive sweeps can be
    subtracted.
    """
    r, m, n, s = chain[k].shape
    if step > 0:
        isometry, rest = _polar(chain[k].reshape(r * m * n, s))  # (r·m·n, s), (s, s)
        chain[k] = isometry.reshape(r, m, n, s)
        chain[k + 1] = torch.einsum("st,tmnu->smnu", rest, chain[k + 1])
    else:
        isometry, rest = _polar(chain[k].reshape(r, m * n * s).T)  # (m·n·s, r), (r, r)
        chain[k] = isometry.T.reshape(r, m, n, s)
        chain[k - 1] = torch.einsum("tmnr,rs->tmns", chain[k - 1], rest)


def _polar(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Polar decomposition ``matrix = isometry @ rest``: (p, q) → (p, q) and (q, q) for p ≥ q, the rest semidefinite."""
    q, r = torch.linalg.qr(matrix)
    u, values, vh = torch.linalg.svd(r)
    return q @ (u @ vh), (vh.T * values) @ vh


def _solve(chain: list[Tensor], k: int, target: Tensor, metrics: Metrics) -> Tensor:
    """Core k, (r, m, n, s), with the least error while the others, isometries towards it, are fixed."""
    core = chain[k]
    r, m, n, s = core.shape
    left = _merge(chain[:k], core)[0]  # (I<, J<, r)
    right = _merge(chain[k + 1 :], core)[..., 0]  # (s, I>, J>)
    wanted = project(target, left, right, m, n)  # (r, m, n, s)
    input_moment, gradient_moment = metrics
    if input_moment is None and gradient_moment is None:
        return wanted  # the normal matrix is the identity
    if input_moment is None or gradient_moment is not None:
        return improve_core(core, wanted, left, right, input_moment, gradient_moment)
    if max(r * n * s, n * min(r * right.shape[2], left.shape[1] * s)) > DIRECT_UNKNOWNS:
        return improve_core(core, wanted, left, right, input_moment)
    normal = _normal_matrix(left, right, input_moment, n)  # (r·n·s, r·n·s)
    start = core.transpose(0, 1).reshape(m, -1)  # (m, r·n·s)
    residual = wanted.transpose(0, 1).reshape(m, -1) - start @ normal  # (m, r·n·s)
    return (start + proximal_step(normal, residual)).reshape(m, r, n, s).transpose(0, 1)


def _merge(cores: list[Tensor], like: Tensor) -> Tensor:
    """Neighbouring cores contracted over their bonds, (r, I, J, s); ones (1, 1, 1, 1) where there are no cores."""
    merged = cores[0] if cores else like.new_ones(1, 1, 1, 1)
    for core in cores[1:]:
        r, i, j, _ = merged.shape
        _, m, n, s = core.shape
        merged = torch.einsum("rijt,tmns->rimjns", merged, core).reshape(r, i * m, j * n, s)  # bond t is summed
    return merged


def _normal_matrix(left: Tensor, right: Tensor, input_moment: Tensor, n: int) -> Tensor:
    """Normal matrix H of one output index, shape (r·n·s, r·n·s), by the formula at the head of this module.

    Args:
        left: L, (I<, J<, r), with J< = x.
        right: R, (s, I>, J>), with J> = y.
        input_moment: C with padding, (x·n·y, x·n·y).
        n: In mode of the site.
    """
    (_, x, r), (s, _, y) = left.shape, right.shape
    right = right.permute(1, 2, 0)  # (I>, J>, s)
    if r * y <= x * s:  # the side that leaves the smaller intermediate goes first
        half = _sandwich(input_moment.reshape(x, n * y, x, n * y), left)  # (r, n·y, r, n·y)
        half = half.reshape(r * n, y, r * n, y).permute(1, 0, 3, 2)  # (y, r·n, y, r·n)
        full = _sandwich(half, right).reshape(s, r, n, s, r, n).permute(1, 2, 0, 4, 5, 3)  # (r, n, s, r, n, s)
    else:
        half = _sandwich(input_moment.reshape(x * n, y, x * n, y).permute(1, 0, 3, 2), right)  # (s, x·n, s, x·n)
        half = half.reshape(s, x, n, s, x, n).permute(1, 2, 0, 4, 5, 3).reshape(x, n * s, x, n * s)
        full = _sandwich(half, left)  # (r, n·s, r, n·s)
    return full.reshape(r * n * s, r * n * s)


def _sandwich(c: Tensor, factor: Tensor) -> Tensor:
    """``Σ factor[a, z, r] c[z, p, z', p'] factor[a, z', r']``, shape (r, p, r', p'), in chunks of r.

    Args:
        c: Shape (z, p, z, p).
        factor: Shape (a, z, r).
    """
    a, z, r = factor.shape  # axes in capitals below are the primed ones
    p = c.shape[1]
    per_index = a * p * z * p if a < r else r * z * z
    chunks = []
    for rows in factor.split(max(1, _CHUNK // per_index), dim=2):
        if a < r:
            half = torch.einsum("azr,zpZP->arpZP", rows, c)
            chunks.append(torch.einsum("arpZP,aZR->rpRP", half, factor))
        else:
            gram = torch.einsum("azr,aZR->zZrR", rows, factor)
            chunks.append(torch.einsum("zpZP,zZrR->rpRP", c, gram))
    return torch.cat(chunks)


def _norm(matrix: Tensor, input_moment: Tensor | None, gradient_moment: Tensor | None) -> float:
    """``‖G^½ M C^½‖_F`` of a matrix M (out, in)."""
    return math.sqrt(max(0.0, float((weigh(matrix, input_moment, gradient_moment) * matrix).sum())))


def check_input_moment(input_moment: Tensor, spec: Spec) -> Tensor:
    """Check that an input moment is a finite (in_features, in_features) matrix, and return it.

    Raises:
        SpecError: It is not, or its diagonal has a negative entry.
    """
    check_types("fit", metric=(input_moment, Tensor))
    if tuple(input_moment.shape) != (spec.in_features, spec.in_features):
        raise SpecError(
            f"metric of shape {tuple(input_moment.shape)}; needed ({spec.in_features}, {spec.in_features})."
        )
    if not torch.isfinite(input_moment).all():
        raise SpecError("metric holds NaN or infinity: the calibration activations of this layer are not finite.")
    if input_moment.diagonal().min() < 0:
        raise SpecError(INDEFINITE)
    return input_moment


def is_large_table(weight: Tensor, gradient_moment: Tensor | None) -> bool:
    """Whether W (out, in) is a table with row weights and more than ``TABLE`` numbers, fitted in fp32 to save memory.

    Linear layers are fitted in fp64 whatever their size.
    """
    return gradient_moment is not None and gradient_moment.dim() == 1 and weight.numel() > TABLE


def check_gradient_moment(gradient_moment: Tensor, spec: Spec) -> Tensor:
    """Check that a gradient moment is finite, of shape (out_features, out_features) or (out_features,), and return it.

    Raises:
        SpecError: It is not, or a weight on its diagonal is negative.
    """
    n = spec.out_features
    if tuple(gradient_moment.shape) not in ((n, n), (n,)):
        raise SpecError(f"gradient_moment of shape {tuple(gradient_moment.shape)}; needed ({n}, {n}), or ({n},).")
    if not torch.isfinite(gradient_moment).all():
        raise SpecError("gradient_moment holds NaN or infinity: this layer's gradients or counts are not finite.")
    if (gradient_moment if gradient_moment.dim() == 1 else gradient_moment.diagonal()).min() < 0:
        raise SpecError(f"gradient_moment: {INDEFINITE}")
    return gradient_moment


def _check_cores(cores: Sequence[Tensor], spec: Spec) -> Sequence[Tensor]:
    shapes = tuple(tuple(core.shape) for core in cores)
    if shapes != spec.core_shapes:
        raise SpecError(f"weighted_als: cores of shapes {shapes}; the spec needs {spec.core_shapes}.")
    return cores
