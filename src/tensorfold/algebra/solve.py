"""One way in to every solver: dense weight and spec to cores, in the plain or in the inputs' metric."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tensorfold.algebra.als import check_metric, weighted_als
from tensorfold.algebra.spec import Spec
from tensorfold.algebra.ttsvd import balance, check_weight, leading_eigenvectors, left_basis, tt_svd

_CHUNK = 2**21  # elements worked on at a time in fp64


class Factors(NamedTuple):
    """What a solver returns.

    Attributes:
        cores: Shapes ``spec.core_shapes``.
        scalars: Shape (terms,), where the spec has scalars; 1 if None.
        out_order, in_order: int64 index orders for the sides in ``spec.reordered``:
            ``weight[out_order][:, in_order]`` is what the cores approximate.
    """

    cores: list[Tensor]
    scalars: Tensor | None = None
    out_order: Tensor | None = None
    in_order: Tensor | None = None


def fit(weight: Tensor, spec: Spec, metric: Tensor | None = None, start: list[Tensor] | None = None) -> list[Tensor]:
    """Cores of ``spec`` that approximate ``weight``.

    Without a metric: TT-SVD, nearest in the Frobenius norm. With the second moment C of the inputs: smallest
    ``‖(W − Ŵ) C^½‖``, the mean squared error of the layer's output; exact for low rank, by weighted alternating least
    squares started from the TT-SVD for every other shape.

    Args:
        weight: Shape (out_features, in_features), any floating dtype.
        metric: C, shape (in_features, in_features), symmetric and positive semidefinite; may be singular.
        start: Cores that weighted alternating least squares starts from, instead of the TT-SVD.

    Returns:
        Cores of shapes ``spec.core_shapes``, fp32 or ``weight``'s dtype if that is fp64.

    Raises:
        SpecError: A shape does not fit, or weight or metric hold NaN or infinity.
    """
    check_weight(weight, spec)
    if metric is None:
        return tt_svd(weight, spec)
    check_metric(metric, spec)
    if spec.is_low_rank and not spec.is_padded and start is None:
        return whitened_low_rank(weight, metric, spec)
    return weighted_als(weight, spec, start or tt_svd(weight, spec), metric).cores


def whitened_low_rank(weight: Tensor, metric: Tensor, spec: Spec) -> list[Tensor]:
    """The rank-r matrix with the smallest ``‖(W − Ŵ) C^½‖``: ``U (Uᵀ W)``, U the leading eigenvectors of ``W C Wᵀ``.

    The optimum of SVD-LLM (arXiv 2403.07378) without its Cholesky factor or any inverse, so it holds for singular C.
    For a tall W the same subspace comes from the smaller matrix ``C^½ Wᵀ W C^½``.
    """
    result = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
    w, c = weight.double(), metric.double()
    rank = spec.ranks[0]
    if w.shape[0] <= w.shape[1]:
        basis = leading_eigenvectors(w @ c @ w.T, rank)  # (out, r)
    else:
        values, vectors = torch.linalg.eigh(c)
        basis = left_basis(w @ (vectors * values.clamp_min(0).sqrt()), rank)
    return [core.to(result) for core in balance([basis[None, :, None, :], (basis.T @ w)[:, None, :, None]])]


def relative_error(weight: Tensor, approximation: Tensor, metric: Tensor | None = None) -> float:
    """``‖(W − Ŵ) C^½‖ / ‖W C^½‖`` over the real rows and columns; C is the identity where no metric is given.

    A weight of norm zero is matched exactly or not at all: 0.0 or infinity.
    """
    above = below = 0.0
    # In chunks of rows: four fp64 copies of an embedding table would dwarf the model.
    chunk = max(1, _CHUNK // weight.shape[1])
    for w, approximate in zip(weight.split(chunk), approximation.split(chunk), strict=True):
        above += _squared_norm(w.double() - approximate.double(), metric)
        below += _squared_norm(w.double(), metric)
    if below == 0.0:
        return 0.0 if above == 0.0 else float("inf")
    return (above / below) ** 0.5


def norm_ratio(weight: Tensor, approximation: Tensor, metric: Tensor | None = None) -> float:
    """Krony-PT's ``α = ‖W C^½‖ / ‖Ŵ C^½‖``, by which a shrunken approximation regains its norm; 1 for a zero one."""
    norm = _squared_norm(approximation.double(), metric)
    return (_squared_norm(weight.double(), metric) / norm) ** 0.5 if norm else 1.0


def _squared_norm(matrix: Tensor, metric: Tensor | None) -> float:
    weighted = matrix if metric is None else matrix @ metric.double()
    return max(0.0, float((weighted * matrix).sum()))
