"""Graded low rank: an embedding table whose rows share one basis; frequent tokens use more of it than rare ones.

    E[order] ≈ [ X ; U_2 B[:r_2] ; … ; U_K B[:r_K] ]

Notation:
    E           table, (vocabulary, width); e_t its row for token t
    order       token at each place, most important first, cut into K classes
    X           rows of the first class as they are, (n_1, width), where its rank is the width
    U_k         coefficients of class k, (n_k, r_k), for n_k tokens of rank r_k
    B           basis, (r, width), r the largest rank below the width; class k reads its first r_k rows
    w           importance of every token, (vocabulary,), mean 1 inside this module
    C           metric of the error of a row, (width, width)
    S           Σ w_t y_t y_tᵀ over a class, y = C^½ e, (width, width)
    V           orthonormal columns, (width, r), of which B are the rows mapped back by C^−½

One class is low rank. Two classes, the first exact, are "frequent tokens exact, the rest of low rank", as in
GroupReduce (arXiv 1806.06950) and adaptive inputs (arXiv 1809.10853), where nothing is shared.
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
_FLOOR = 1e-9  # smallest eigenvalue of C that counts, as a part of its largest


def graded_low_rank(
    table: Tensor,
    spec: GradedSpec,
    importance: Tensor | None = None,
    metric: Tensor | None = None,
    sweeps: int = 30,
) -> Factors:
    """Fit a graded table Ê to E with a small error ``Σ_t w_t ‖(e_t − ê_t) C^½‖²``.

    For orthonormal V the best coefficients of a row y are its products with V, and a class of rank r keeps the energy
    ``tr(V_rᵀ S V_r)``, V_r the first r columns. The sum over classes is convex in V, so the polar factor of its
    gradient is never worse than V: each sweep takes it. With one class, the start (leading eigenvectors of the sum of
    all S) is the optimum: weighted PCA.

    Args:
        table: E, shape (vocabulary, width), any floating dtype.
        spec: Classes of tokens with their ranks.
        importance: w, shape (vocabulary,), positive: decides the order of the rows and weighs their errors; equal
            weights if None.
        metric: C, shape (width, width), symmetric and positive semidefinite; the identity if None.
        sweeps: At most this many; fewer once they gain nothing any more.

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
    """Check shapes and values; return the importance w, (vocabulary,), fp64, of mean 1."""
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
    """``C^½`` and ``C^−½``, (width, width); eigenvalues of C below ``_FLOOR`` of the largest are raised to it."""
    if metric is None:
        identity = torch.eye(width, dtype=torch.float64, device=device)
        return identity, identity
    values, vectors = torch.linalg.eigh(metric.to(device).double())
    roots = values.clamp_min(max(float(values[-1]) * _FLOOR, torch.finfo(torch.float64).tiny)).sqrt()
    return (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT


def _moment(table: Tensor, rows: Tensor, weights: Tensor, into: Tensor) -> Tensor:
    """S, (width, width), fp64: ``Σ w_t y_t y_tᵀ`` over a class.

    Args:
        table: E, (vocabulary, width).
        rows: Tokens of the class, int64, (n,).
        weights: w, (vocabulary,).
        into: ``C^½``, (width, width).
    """
    total = torch.zeros_like(into)
    for some in rows.split(max(1, _CHUNK // into.shape[0])):
        part = table[some].double()
        total += part.mT @ (part * weights[some, None])
    return into @ total @ into


def _basis(moments: Sequence[Tensor], ranks: Sequence[int], sweeps: int) -> Tensor:
    """V, orthonormal columns (width, largest rank), by ascent of the energy ``Σ_k tr(V_rᵀ S_k V_r)`` that it keeps.

    Args:
        moments: S of every class, (width, width) each.
        ranks: r of every class.
        sweeps: At most this many polar steps.
    """
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
    """Factor of every column of coefficients, (r,), that spreads its norm evenly over it and its row of the basis.

    Args:
        coefficients: U of every class, (n_k, r_k).
        basis: B, (r, width).
    """
    squares = torch.zeros(basis.shape[0], dtype=basis.dtype, device=basis.device)
    for part in coefficients:
        squares[: part.shape[1]] += part.square().sum(0)
    norms = torch.linalg.vector_norm(basis, dim=1)
    return torch.where(squares > 0, (norms / squares.sqrt()).sqrt(), torch.ones_like(norms))
