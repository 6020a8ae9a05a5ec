"""TT-SVD of a matrix into a matrix product operator; the Van Loan decomposition is its two-site case.

Notation:
    W           matrix, (out, in), padded to (m_1 · … · m_L, n_1 · … · n_L)
    m_k, n_k    out and in mode of site k of L
    r, s        left and right bond of a core (r, m, n, s)
    R           unfolding of W at a bond: rows are the sites up to it, (r·m·n, all sites behind)

Sources: Oseledets, "Tensor-Train Decomposition", SIAM J. Sci. Comput. 33 (2011), Algorithm 1; Van Loan & Pitsianis,
"Approximation with Kronecker Products" (1993). Sweeping left to right, each unfolding is projected on its leading left
singular vectors. Its shape decides how they are found: from the Gram matrix of its smaller side, exact to working
precision and cheap for the thin unfoldings that Kronecker shapes have; or, where few of many are wanted, by a block
Krylov space (Musco & Musco, arXiv 1504.05477), which never forms the Gram matrix. Both are deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorfold.algebra.specs.spec import Spec
from tensorfold.errors import SpecError
from tensorfold.utils.validation import check_floating, check_types

# A matrix up to this many elements is worked on in fp64 as a whole (64 MB); beyond it only Gram matrices are fp64.
_WHOLE_FP64 = 2**23
_CHUNK = 2**21  # elements worked on at a time in fp64
_THIN = 32  # columns that a thin matrix has at most

# A Krylov space is worth it where the smaller side is at least _WIDE, and _MANY times the vectors wanted.
_WIDE, _MANY = 256, 24
_GAIN = 1e-7  # part of the remaining energy; less than this from two steps running, and the space is good enough


def tt_svd(weight: Tensor, spec: Spec) -> list[Tensor]:
    """Decompose a matrix by TT-SVD, truncated at every bond of a spec.

    For two sites this is the best approximation in the Frobenius norm (Eckart–Young on the rearranged matrix); for L
    sites it is within √(L−1) of it.

    Args:
        weight: W, shape (out_features, in_features), any floating dtype.
        spec: Modes and bonds.

    Returns:
        Cores of shapes ``spec.core_shapes``, norms spread evenly over every bond (√σ on each factor for two sites),
        in ``weight``'s dtype if that is fp32 or fp64, else fp32.

    Raises:
        SpecError: ``weight`` has another shape than ``spec``, or is not finite.
    """
    result = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
    _check_kind(weight, spec)
    thin = _thin_cores(weight, spec, result)
    if thin is not None:
        return thin
    working = torch.float64 if weight.numel() <= _WHOLE_FP64 else torch.float32
    rest = unfold(check_weight(weight, spec).to(working), spec)
    cores = []
    for r, m, n, s in spec.core_shapes[:-1]:
        rest = rest.reshape(r * m * n, -1)  # R
        basis = left_basis(rest, s)  # (r·m·n, s)
        cores.append(basis.reshape(r, m, n, s))
        rest = basis.T @ rest  # (s, all sites behind)
    cores.append(rest.reshape(spec.core_shapes[-1]))
    return [core.to(result).contiguous() for core in balance(cores)]


def _thin_cores(weight: Tensor, spec: Spec, result: torch.dtype) -> list[Tensor] | None:
    """TT-SVD of two sites whose unfolding R has far more rows than columns, in two passes over it; else None.

    With V the leading eigenvectors of the small Gram matrix ``Rᵀ R`` the best approximation of R is ``(R V) Vᵀ``, and
    the columns of ``R V`` have the norms σ already: no basis has to be made orthogonal, and no copy in fp64 is needed,
    because an error in V counts only by its square. Where the small factor has one row or column, R is W reshaped.
    """
    if spec.sites != 2:
        return None
    (_, m1, n1, r), (_, m2, n2, _) = spec.core_shapes
    if m2 * n2 > _THIN or m1 * n1 < 32 * m2 * n2:
        return None
    padded = pad(weight, spec).to(result)
    by_rows = n2 == 1  # blocks (small, n1), else (n1, small)
    if by_rows or m2 == 1:
        blocks = padded.reshape(m1, m2, n1) if by_rows else padded.reshape(m1, n1, n2)
    else:
        blocks = padded.reshape(m1, m2, n1, n2).transpose(1, 2).reshape(m1, n1, m2 * n2)
    gram = torch.bmm(blocks, blocks.mT) if by_rows else torch.bmm(blocks.mT, blocks)
    total = gram.sum(0, dtype=torch.float64)
    if not bool(torch.isfinite(total).all()):
        return None  # the values are not, or too large to square
    right = leading_eigenvectors(total, r)  # (m2·n2, r)
    if by_rows:
        left = torch.bmm(right.T.to(result).expand(m1, -1, -1), blocks).mT
    else:
        left = torch.bmm(blocks, right.to(result).expand(m1, -1, -1))  # (m1, n1, r)
    norms = torch.linalg.vector_norm(left, dim=(0, 1), dtype=torch.float64)
    root = torch.where(norms > 0, norms, torch.ones_like(norms)).sqrt()  # √σ on each side, as balance would put it
    second = (right * norms / root).T.to(result).reshape(r, m2, n2, 1)
    return [(left / root.to(result)).reshape(1, m1, n1, r).contiguous(), second.contiguous()]


def check_weight(weight: Tensor, spec: Spec) -> Tensor:
    """Check that a weight has the spec's shape and holds neither NaN nor infinity, and return it.

    Raises:
        SpecError: It has another shape, an integer dtype, or a value that is not finite.
    """
    _check_kind(weight, spec)
    if not torch.isfinite(weight).all():
        raise SpecError("weight holds NaN or infinity; repair the checkpoint, or exclude this module.")
    return weight


def _check_kind(weight: Tensor, spec: Spec) -> None:
    """Check that a weight is a floating tensor of the spec's shape (out_features, in_features)."""
    check_types("fit", weight=(weight, Tensor))
    if tuple(weight.shape) != (spec.out_features, spec.in_features):
        raise SpecError(
            f"weight of shape {tuple(weight.shape)}; the spec needs ({spec.out_features}, {spec.in_features}), "
            "always (out, in)."
        )
    check_floating(weight=weight)


def pad(weight: Tensor, spec: Spec) -> Tensor:
    """Pad a weight (out, in) with zero rows and columns to the products of the modes, (Π m_k, Π n_k)."""
    rows, columns = math.prod(spec.out_modes), math.prod(spec.in_modes)
    return F.pad(weight, (0, columns - weight.shape[1], 0, rows - weight.shape[0]))


def unfold(weight: Tensor, spec: Spec) -> Tensor:
    """Rearrange a weight from (i1…iL, j1…jL) to the order i1 j1 i2 j2 … iL jL, flat (Van Loan's for two sites)."""
    sites = spec.sites
    order = [axis for k in range(sites) for axis in (k, sites + k)]
    return pad(weight, spec).reshape(*spec.out_modes, *spec.in_modes).permute(order).reshape(-1)


def gram(matrix: Tensor) -> Tensor:
    """Gram matrix ``A Aᵀ`` of A (rows, columns), accumulated in fp64 over chunks of columns; (rows, rows)."""
    columns = max(1, _CHUNK // matrix.shape[0])
    out = torch.zeros(matrix.shape[0], matrix.shape[0], dtype=torch.float64, device=matrix.device)
    for chunk in matrix.split(columns, dim=1):
        chunk = chunk.double()
        out.addmm_(chunk, chunk.T)
    return out


def left_basis(matrix: Tensor, rank: int) -> Tensor:
    """Leading left singular vectors of a matrix (rows, columns), orthonormal, signs fixed; (rows, rank).

    They come from a Krylov space where few of many are wanted, else from eigenvectors of the smaller Gram matrix; right
    singular vectors are turned into left ones by QR.
    """
    rows, columns = matrix.shape
    if min(rows, columns) >= max(_WIDE, _MANY * rank):
        right = _krylov(matrix, rank)
        if right is not None:
            return _fix_signs(torch.linalg.qr(matrix @ right).Q)
    if rows <= columns:
        basis = leading_eigenvectors(gram(matrix), rank).to(matrix.dtype)
    else:
        right = leading_eigenvectors(gram(matrix.T), rank).to(matrix.dtype)
        basis = torch.linalg.qr(matrix @ right).Q
    return _fix_signs(basis)


def _krylov(matrix: Tensor, rank: int) -> Tensor | None:
    """Leading right singular vectors of a matrix, (columns, rank), orthonormal, up to a vanishing part of their energy.

    Golub and Kahan's process with a block of vectors, made orthogonal to all before them (Musco & Musco, arXiv
    1504.05477). It starts from random numbers with a fixed seed.

    Returns:
        None where the space has grown so large that the Gram matrix would have cost less.
    """
    columns, dtype = matrix.shape[1], matrix.dtype
    energy = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(columns, rank, generator=generator, dtype=dtype).to(matrix.device)
    space, images = torch.empty(columns, 0, dtype=dtype, device=matrix.device), matrix[:, :0]
    kept, idle = 0.0, 0
    while space.shape[1] + block.shape[1] <= min(matrix.shape) // 2:
        block = _new_directions(block, space)
        if energy == 0.0 or not block.shape[1]:
            break  # the space holds all there is
        space, images = torch.cat([space, block], 1), torch.cat([images, matrix @ block], 1)
        values, vectors = torch.linalg.eigh((images.T @ images).double())
        before, kept = kept, float(values[-rank:].sum())
        idle = idle + 1 if kept - before <= _GAIN * max(energy - kept, 0.0) + 1e-15 * energy else 0
        if idle == 2:
            break
        block = matrix.T @ images[:, -block.shape[1] :]
    else:
        return None
    if space.shape[1] < rank:
        return None
    values, vectors = torch.linalg.eigh((images.T @ images).double())
    return space @ _fix_signs(vectors[:, -rank:].flip(-1)).to(dtype)


def _new_directions(block: Tensor, space: Tensor) -> Tensor:
    """Orthonormal basis of the span that a block adds to a space: (columns, b) and (columns, k) → (columns, ≤ b).

    What is left of a column within the space is rounding, and no direction: it is dropped. What is left of one nearly
    within it is partly rounding, and so made orthogonal once more, after it has been given the length 1.

    Args:
        block: Any columns.
        space: Orthonormal columns.
    """
    size = torch.linalg.vector_norm(block)
    for _ in range(2):  # once leaves what rounding put back
        block = block - space @ (space.T @ block)
    q, r = torch.linalg.qr(block)
    u, lengths, _ = torch.linalg.svd(r)
    block = q @ u[:, lengths > 16 * torch.finfo(block.dtype).eps * size]
    for _ in range(2):
        block = torch.linalg.qr(block - space @ (space.T @ block)).Q
    return block


def leading_eigenvectors(symmetric: Tensor, count: int) -> Tensor:
    """Eigenvectors of a symmetric matrix's largest eigenvalues, largest first, signs fixed: (n, n) → (n, count)."""
    return _fix_signs(torch.linalg.eigh(symmetric).eigenvectors[:, -count:].flip(-1))


def _fix_signs(vectors: Tensor) -> Tensor:
    """Turn columns so that the largest entry of each is positive, whatever sign the eigensolver chose; (n, k)."""
    peak = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(peak < 0, -1.0, 1.0).to(vectors.dtype)


def balance(cores: Sequence[Tensor]) -> list[Tensor]:
    """Spread the norm of a chain of cores evenly over its bonds and cores; its matrix does not change.

    Both sides of a bond index get the same Frobenius norm, bond by bond from the left, so that two sites have √σ on
    each factor (Krony-PT); in longer chains all cores then get the same norm. Training is equally fast in every core,
    and half precision neither overflows in one core nor underflows in another.
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
