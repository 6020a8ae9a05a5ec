"""TT-SVD of a matrix into a matrix product operator; the Van Loan decomposition is its two-site case.

Sources: Oseledets, "Tensor-Train Decomposition", SIAM J. Sci. Comput. 33 (2011), Algorithm 1; Van Loan & Pitsianis,
"Approximation with Kronecker Products" (1993). Sweeping left to right, each unfolding is projected on its leading left
singular vectors, found through the Gram matrix of its smaller side: exact to working precision, deterministic, and
cheap for the thin unfoldings that Kronecker shapes have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorfold.algebra.spec import Spec
from tensorfold.errors import SpecError

# A matrix up to this many elements is worked on in fp64 as a whole (64 MB); beyond it only Gram matrices are fp64.
_WHOLE_FP64 = 2**23
_CHUNK = 2**21


def tt_svd(weight: Tensor, spec: Spec) -> list[Tensor]:
    """Cores of the TT-SVD of ``weight`` with the bonds of ``spec``.

    For two sites this is the best approximation in the Frobenius norm (Eckart–Young on the rearranged matrix); for L
    sites it is within √(L−1) of it.

    Args:
        weight: Shape (out_features, in_features), any floating dtype.

    Returns:
        Cores of shapes ``spec.core_shapes``, norms spread evenly over every bond (√σ on each factor for two sites),
        in ``weight``'s dtype if that is fp32 or fp64, else fp32.

    Raises:
        SpecError: ``weight`` has another shape than ``spec``, or is not finite.
    """
    working = torch.float64 if weight.numel() <= _WHOLE_FP64 else torch.float32
    result = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
    rest = unfold(check_weight(weight, spec).to(working), spec)
    cores = []
    for r, m, n, s in spec.core_shapes[:-1]:
        rest = rest.reshape(r * m * n, -1)
        basis = left_basis(rest, s)  # (r·m·n, s)
        cores.append(basis.reshape(r, m, n, s))
        rest = basis.T @ rest
    cores.append(rest.reshape(spec.core_shapes[-1]))
    return [core.to(result).contiguous() for core in balance(cores)]


def check_weight(weight: Tensor, spec: Spec) -> Tensor:
    """``weight`` itself, after checking that its shape is the spec's and that it holds neither NaN nor infinity."""
    if tuple(weight.shape) != (spec.out_features, spec.in_features):
        raise SpecError(
            f"weight of shape {tuple(weight.shape)}; the spec needs ({spec.out_features}, {spec.in_features}), "
            "always (out, in)."
        )
    if not torch.isfinite(weight).all():
        raise SpecError("weight holds NaN or infinity; repair the checkpoint, or exclude this module.")
    return weight


def pad(weight: Tensor, spec: Spec) -> Tensor:
    """``weight`` with zero rows and columns up to the products of the modes."""
    rows, columns = math.prod(spec.out_modes), math.prod(spec.in_modes)
    return F.pad(weight, (0, columns - weight.shape[1], 0, rows - weight.shape[0]))


def unfold(weight: Tensor, spec: Spec) -> Tensor:
    """Van Loan's rearrangement for any number of sites: (i1…iL, j1…jL) to the order i1 j1 i2 j2 … iL jL, flat."""
    sites = spec.sites
    order = [axis for k in range(sites) for axis in (k, sites + k)]
    return pad(weight, spec).reshape(*spec.out_modes, *spec.in_modes).permute(order).reshape(-1)


def gram(matrix: Tensor) -> Tensor:
    """``matrix @ matrix.T`` accumulated in fp64 over column chunks; shape (rows, rows)."""
    columns = max(1, _CHUNK // matrix.shape[0])
    out = torch.zeros(matrix.shape[0], matrix.shape[0], dtype=torch.float64, device=matrix.device)
    for chunk in matrix.split(columns, dim=1):
        chunk = chunk.double()
        out.addmm_(chunk, chunk.T)
    return out


def left_basis(matrix: Tensor, rank: int) -> Tensor:
    """Orthonormal basis of the ``rank`` leading left singular vectors of ``matrix``; shape (rows, rank).

    Eigenvectors of the smaller Gram matrix, completed by QR where they are those of the other side.
    """
    rows, columns = matrix.shape
    if rows <= columns:
        basis = leading_eigenvectors(gram(matrix), rank).to(matrix.dtype)
    else:
        right = leading_eigenvectors(gram(matrix.T), rank).to(matrix.dtype)
        basis = torch.linalg.qr(matrix @ right).Q
    return _fix_signs(basis)


def leading_eigenvectors(symmetric: Tensor, count: int) -> Tensor:
    """Eigenvectors of the ``count`` largest eigenvalues, largest first, signs fixed; shape (n, count)."""
    return _fix_signs(torch.linalg.eigh(symmetric).eigenvectors[:, -count:].flip(-1))


def _fix_signs(vectors: Tensor) -> Tensor:
    """Columns turned so that the largest entry of each is positive, whatever sign the eigensolver chose."""
    peak = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(peak < 0, -1.0, 1.0).to(vectors.dtype)


def balance(cores: Sequence[Tensor]) -> list[Tensor]:
    """The same operator with the norm spread evenly: both sides of every bond index get the same Frobenius norm.

    Two sites get √σ on each factor (Krony-PT). Training is then equally fast in every core, and half precision
    neither overflows in one core nor underflows in another.
    """
    out = [core.clone() for core in cores]
    for k in range(len(out) - 1):
        left = torch.linalg.vector_norm(out[k], dim=(0, 1, 2))  # (r,)
        right = torch.linalg.vector_norm(out[k + 1], dim=(1, 2, 3))  # (r,)
        alive = (left > 0) & (right > 0)
        scale = torch.where(alive, (right / left.where(alive, torch.ones_like(left))).sqrt(), torch.ones_like(left))
        out[k] = out[k] * scale
        out[k + 1] = out[k + 1] / scale.reshape(-1, 1, 1, 1)
    # One sweep leaves the bond norms even but the cores' own norms uneven in long chains: share them out.
    norms = torch.stack([torch.linalg.vector_norm(core) for core in out])
    if len(out) > 2 and bool((norms > 0).all()):
        mean = norms.log().mean().exp()
        out = [core * (mean / norm) for core, norm in zip(out, norms, strict=True)]
    return out
