"""TT-SVD of every row of an embedding table: TensorGPT's table with one matrix product state (MPS) a token.

    E[t, (j1 … jN)] = G1[t; j1] · G2[t; j2] · … · GN[t; jN]

Notation:
    E           table, (vocabulary, width)
    t           token; j_k index of site k, below its mode n_k; N sites with Π n_k ≥ width
    Gk          core k, (vocabulary, r[k-1], n_k, r[k]), the outer bonds 1

A row, padded with zeros to Π n_k numbers, is a tensor of order N and has its own TT-SVD. Tokens share nothing: the work
splits over any number of workers, and a new token needs one more small decomposition.
Sources: TensorGPT, arXiv 2307.00526; TensorSLM, arXiv 2506.13514; Oseledets, "Tensor-Train Decomposition" (2011).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorfold.algebra.specs.token_mps import TokenMPSSpec
from tensorfold.errors import SpecError
from tensorfold.utils.validation import check_floating

_CHUNK = 2**21  # padded numbers decomposed at a time in fp64 (16 MB)


def token_mps_svd(table: Tensor, spec: TokenMPSSpec) -> list[Tensor]:
    """Decompose every row of a table by TT-SVD, within √(N−1) of its best approximation in the Frobenius norm.

    Rows are worked on in chunks of bounded memory; a chunk's cores do not depend on the other rows, so any division of
    the table over processes gives these cores.

    Args:
        table: E, shape (vocabulary, width), any floating dtype.
        spec: Modes and bonds.

    Returns:
        Cores of shapes ``spec.core_shapes``, norms spread evenly over the bonds of each chain, in ``table``'s dtype if
        that is fp32 or fp64, else fp32.

    Raises:
        SpecError: ``table`` has another shape than ``spec``, or is not finite.
    """
    if tuple(table.shape) != (spec.vocabulary, spec.width):
        raise SpecError(f"table of shape {tuple(table.shape)}; the spec needs ({spec.vocabulary}, {spec.width}).")
    check_floating(table=table)
    result = table.dtype if table.dtype in (torch.float32, torch.float64) else torch.float32
    cores = [table.new_empty(shape, dtype=result) for shape in spec.core_shapes]
    chunk = max(1, _CHUNK // spec.padded_width)
    for start in range(0, spec.vocabulary, chunk):
        part = table[start : start + chunk].double()
        if not torch.isfinite(part).all():
            raise SpecError("table holds NaN or infinity; repair the checkpoint, or exclude this module.")
        for core, solved in zip(cores, _decompose(part, spec), strict=True):
            core[start : start + chunk] = solved
    return cores


def _decompose(table: Tensor, spec: TokenMPSSpec) -> list[Tensor]:
    """TT-SVD of the rows of a table (tokens, width), left to right: cores (tokens, r[k-1], n_k, r[k]).

    Bonds that their cut makes full rank truncate nothing, so there any basis will do, and the identity costs nothing.
    """
    tokens = table.shape[0]
    rest = F.pad(table, (0, spec.padded_width - spec.width))
    cores = []
    for _, left, mode, right in spec.core_shapes[:-1]:
        rest = rest.reshape(tokens, left * mode, rest.numel() // (tokens * left * mode))  # (tokens, r·n, columns)
        rows, columns = rest.shape[1:]
        if right == rows:
            basis = _identity(rest, rows)
        elif right == columns:
            basis, rest = rest, _identity(rest, columns)
        else:
            basis = _left_basis(rest, right)  # (tokens, r·n, s)
            rest = basis.mT @ rest  # (tokens, s, columns)
        cores.append(basis.reshape(tokens, left, mode, right))
    _, left, mode, _ = spec.core_shapes[-1]
    cores.append(rest.reshape(tokens, left, mode, 1))
    return _balance(cores)


def _identity(like: Tensor, size: int) -> Tensor:
    """Identity matrix of a size, expanded over the tokens of ``like``: (tokens, size, size)."""
    return torch.eye(size, dtype=like.dtype, device=like.device).expand(like.shape[0], size, size)


def _left_basis(matrices: Tensor, rank: int) -> Tensor:
    """Leading left singular vectors of each matrix, signs fixed: (tokens, rows, columns) → (tokens, rows, rank).

    They come from eigenvectors of the smaller Gram matrix, in fp64. Its side is at most a few times the bond, so a
    batch of them is cheap.
    """
    if matrices.shape[1] <= matrices.shape[2]:
        basis = _leading_eigenvectors(matrices @ matrices.mT, rank)
    else:
        basis = torch.linalg.qr(matrices @ _leading_eigenvectors(matrices.mT @ matrices, rank)).Q
    peak = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    return torch.where(peak < 0, -basis, basis)


def _leading_eigenvectors(symmetric: Tensor, count: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues, largest first: (tokens, n, n) → (tokens, n, count)."""
    return torch.linalg.eigh(symmetric).eigenvectors[..., -count:].flip(-1)


def _balance(cores: Sequence[Tensor]) -> list[Tensor]:
    """Spread the norm of every token's chain evenly over its bonds and cores, as ``ttsvd.balance`` does for one.

    The rows that the cores, (tokens, r, n, s) each, stand for do not change.
    """
    out = list(cores)
    for k in range(len(out) - 1):
        left = torch.linalg.vector_norm(out[k], dim=(1, 2))  # (tokens, r)
        right = torch.linalg.vector_norm(out[k + 1], dim=(2, 3))  # (tokens, r)
        alive = (left > 0) & (right > 0)
        scale = torch.where(alive, (right / left.where(alive, torch.ones_like(left))).sqrt(), torch.ones_like(left))
        out[k] = out[k] * scale[:, None, None, :]
        out[k + 1] = out[k + 1] / scale[:, :, None, None]
    norms = torch.stack([torch.linalg.vector_norm(core, dim=(1, 2, 3)) for core in out])  # (sites, tokens)
    alive = (norms > 0).all(0)
    norms = norms.where(alive, torch.ones_like(norms))
    scale = norms.log().mean(0).exp() / norms
    return [core * scale[k][:, None, None, None] for k, core in enumerate(out)]
