"""Graded low rank: a table whose rows share one basis, and of which frequent tokens use more than rare ones.

    E[order] ≈ [ X ; U_2 B[:r_2] ; … ; U_C B[:r_C] ]        X: the most frequent rows as they are, B: (basis, width)

Rows are sorted by how often they are used and cut into classes. A class of n tokens has n × r coefficients, which read
the first r rows of the basis B, so B serves the common directions first. Low rank is the case of one class, and
"frequent tokens exact, the rest of low rank" (as in GroupReduce, arXiv 1806.06950, and adaptive inputs, arXiv
1809.10853, where nothing is shared) that of two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tensorfold.algebra.solvers.solve import Factors
from tensorfold.algebra.specs.graded import GradedSpec
from tensorfold.errors import SpecError
from tensorfold.utils.validation import check_floating

_CHUNK = 2**21  # elements worked on at a time in fp64
_FLOOR = 1e-9  # of the metric's largest eigenvalue: directions below it are as good as never read


def graded_low_rank(
    table: Tensor,
    spec: GradedSpec,
    importance: Tensor | None = None,
    metric: Tensor | None = None,
    sweeps: int = 30,
) -> Factors:
    """The table nearest to ``table`` in the error ``Σ_t w_t ‖(e_t − ê_t) C^½‖²``, rows sorted by ``w``.

    In the metric, and for an orthonormal basis V, a row's best coefficients are its products with V, and what a class
    keeps is ``tr(V_rᵀ S V_r)`` with S the weighted second moment of its rows. The sum over classes is convex in V, so
    the polar factor of its gradient is never worse than V: each sweep takes it. With one class, the start (leading
    eigenvectors of all S) is the optimum: weighted PCA.

    Args:
        table: Shape (vocabulary, width), any floating dtype.
        importance: w, shape (vocabulary,), positive: the order of the rows and the weight of their errors; equal if
            None.
        metric: C, shape (width, width), symmetric and positive semidefinite; the identity if None.
        sweeps: At most this many; fewer where they gain nothing any more.

    Returns:
        Cores of shapes ``spec.core_shapes``, fp32 or ``table``'s dtype if that is fp64; ``out_order``: token index at
        each place.

    Raises:
        SpecError: A shape does not fit, or a value is not finite or has the wrong sign.
    """
    weights = _check(table, spec, importance, metric)
    result = table.dtype if table.dtype in (torch.float32, torch.float64) else torch.float32
    order = weights.argsort(descending=True, stable=True)
    into, back = _roots(metric, spec.width, table.device)
    places = list(zip(spec.starts, spec.classes, strict=True))
    members = [order[start : start + tokens] for start, (tokens, _) in places]
    graded = [(rows, rank) for rows, (_, rank) in zip(members, spec.classes, strict=True) if rank < spec.width]
    if not graded:
        return Factors([table[order].to(result)], out_order=order)
    moments = [_moment(table, rows, weights, into) for rows, _ in graded]
    basis = _basis(moments, [rank for _, rank in graded], sweeps)
    project, rebuild = into @ basis, basis.mT @ back  # (width, r), (r, width)
    coefficients = [table[rows].double() @ project[:, :rank] for rows, rank in graded]
    scale = _evening(coefficients, rebuild)
    exact = [table[rows].double() for rows, (_, rank) in zip(members, spec.classes, strict=True) if rank == spec.width]
    cores = [*exact, *(part * scale[: part.shape[1]] for part in coefficients), rebuild / scale[:, None]]
    return Factors([core.to(result) for core in cores], out_order=order)


def _check(table: Tensor, spec: GradedSpec, importance: Tensor | None, metric: Tensor | None) -> Tensor:
    """The weights in fp64, of mean 1."""
    needed = {"table": (spec.vocabulary, spec.width), "importance": (spec.vocabulary,), "metric": (spec.width,) * 2}
    for name, given in {"table": table, "importance": importance, "metric": metric}.items():
        if given is None:
            continue
        if tuple(given.shape) != needed[name]:
            raise SpecError(f"{name} of shape {tuple(given.shape)}; the spec needs {needed[name]}.")
        if name == "table":
            check_floating(table=given)
        if not torch.isfinite(given).all():
            raise SpecError(f"{name} holds NaN or infinity; repair the checkpoint, or exclude this module.")
    if importance is None:
        return torch.ones(spec.vocabulary, dtype=torch.float64, device=table.device)
    if not (importance > 0).all():
        raise SpecError("importance holds numbers that are not positive; every token needs some, seen or not.")
    weights = importance.to(table.device).double()
    return weights / weights.mean()


def _roots(metric: Tensor | None, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``C^½`` and its inverse, (width, width); directions that C does not know are given a trace of weight."""
    if metric is None:
        identity = torch.eye(width, dtype=torch.float64, device=device)
        return identity, identity
    values, vectors = torch.linalg.eigh(metric.to(device).double())
    roots = values.clamp_min(max(float(values[-1]) * _FLOOR, torch.finfo(torch.float64).tiny)).sqrt()
    return (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT


def _moment(table: Tensor, rows: Tensor, weights: Tensor, into: Tensor) -> Tensor:
    """``Σ w_t y_t y_tᵀ`` of some rows ``y = e C^½``, shape (width, width)."""
    total = torch.zeros_like(into)
    for some in rows.split(max(1, _CHUNK // into.shape[0])):
        part = table[some].double()
        total += part.mT @ (part * weights[some, None])
    return into @ total @ into


def _basis(moments: Sequence[Tensor], ranks: Sequence[int], sweeps: int) -> Tensor:
    """Orthonormal columns, shape (width, largest rank), whose first r keep as much as can be of each class."""
    basis = torch.linalg.eigh(torch.stack(list(moments)).sum(0)).eigenvectors.flip(-1)[:, : max(ranks)]
    kept = -math.inf
    for _ in range(sweeps if len(ranks) > 1 else 0):
        gradient = torch.zeros_like(basis)
        for moment, rank in zip(moments, ranks, strict=True):
            gradient[:, :rank] += moment @ basis[:, :rank]
        before, kept = kept, float((gradient * basis).sum())
        if kept <= before * (1 + 1e-6):
            break
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        basis = left @ right
    return basis


def _evening(coefficients: Sequence[Tensor], basis: Tensor) -> Tensor:
    """Factor for each column of coefficients that gives it the norm of its row of the basis, shape (basis,)."""
    squares = torch.zeros(basis.shape[0], dtype=basis.dtype, device=basis.device)
    for part in coefficients:
        squares[: part.shape[1]] += part.square().sum(0)
    norms = torch.linalg.vector_norm(basis, dim=1)
    return torch.where(squares > 0, (norms / squares.sqrt()).sqrt(), torch.ones_like(norms))
