"""Reordering rows and columns so that a matrix is closer to a sum of Kronecker products.

Notation:
    W           matrix, (out, in) = (m1·m2, n1·n2)
    P, Q        permutations of its rows and columns
    A_t, B_t    factors of term t, (m1, n1) and (m2, n2)

A Kronecker fit depends on which rows and columns share a block, and a trained network's hidden units have no order of
their own. TQCompressor (arXiv 2401.16367) therefore fits ``P W Q ≈ Σ_t A_t ⊗ B_t``; it published no way to find P and
Q. Here the fit (Van Loan) alternates with linear assignments: given the approximation, the best row order is an
assignment of W's rows to its rows, and likewise for the columns, so no step can raise the error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorfold.algebra.contraction.apply import to_dense
from tensorfold.algebra.solvers.ttsvd import check_weight, tt_svd
from tensorfold.algebra.specs.spec import Spec
from tensorfold.algebra.specs.structure import Structure
from tensorfold.errors import SpecError


@dataclass(frozen=True)
class Permuted:
    """Fit of a reordered matrix: ``weight[row_order][:, column_order] ≈ to_dense(cores)``.

    Attributes:
        row_order: int64, shape (out_features,): which row of the weight sits in each row of the approximation. The
            neighbouring matrix takes it along as ``neighbour[:, row_order]``, and a bias as ``bias[row_order]``.
        column_order: int64, shape (in_features,), likewise for columns.
        cores: Shapes ``spec.core_shapes``.
        error: ``‖weight[row_order][:, column_order] − Ŵ‖_F / ‖weight‖_F``.
        error_without: ``‖weight − Ŵ‖_F / ‖weight‖_F`` of the fit with rows and columns left in place; never below
            ``error``.
    """

    row_order: Tensor
    column_order: Tensor
    cores: list[Tensor]
    error: float
    error_without: float


def search_permutations(
    weight: Tensor,
    spec: Spec,
    *,
    rows: bool = True,
    columns: bool = True,
    starts: int = 3,
    sweeps: int = 20,
    tolerance: float = 1e-4,
) -> Permuted:
    """Search row and column orders that lower the error of a two-site fit; never worse than leaving them alone.

    A local search from several initial orders: as given, near-parallel rows gathered into blocks, sorted by the leading
    singular vectors, then random ones from fixed seeds, so the result is the same every time.
    Assigning n rows takes O(n³) time.

    Args:
        weight: Shape (out_features, in_features), any floating dtype. To take the inputs into account, pass
            ``weight * rms`` with ``rms`` (in_features,) the root of the diagonal of their second moment, and fit the
            reordered weight by :func:`tensorfold.algebra.solvers.als.weighted_als` afterwards.
        spec: Two sites, no padding.
        rows: Whether rows may move. Rows of an up-projection are hidden units: their order is free, because the
            down-projection's columns take it along.
        columns: Whether columns may move. Those of an up-projection index the residual stream, so that order has to be
            applied to the inputs at run time.
        starts: Number of initial orders, at least 1.
        sweeps: At most so many rounds of row and column assignments from each.
        tolerance: A round that lowers the error by less than this fraction of it is the last.

    Raises:
        SpecError: ``spec`` has not two sites or pads the weight, ``weight`` does not fit it, neither rows nor columns
            may move, or ``starts`` is below 1.
    """
    if spec.sites != 2 or spec.is_padded:
        raise SpecError(f"search_permutations: {spec} has {spec.sites} sites; needed two, and modes without padding.")
    if not (rows or columns) or starts < 1:
        raise SpecError(
            f"search_permutations: rows={rows}, columns={columns}, starts={starts}; let rows or columns move, from at "
            "least one start."
        )
    w = check_weight(weight, spec).detach().to("cpu", torch.float64)
    best: tuple[float, Tensor, Tensor] | None = None
    for row_order, column_order in _initial_orders(w, spec, rows, columns, starts):
        found = _descend(w, spec, row_order, column_order, rows, columns, sweeps, tolerance)
        if best is None or found[0] < best[0]:
            best = found
    assert best is not None
    error, row_order, column_order = best
    ordered = weight[row_order.to(weight.device)][:, column_order.to(weight.device)]
    without = _relative(w, to_dense(tt_svd(w, spec), spec))
    return Permuted(row_order, column_order, tt_svd(ordered, spec), error, without)


def search_row_order(
    matrices: Sequence[tuple[Tensor, Structure]], *, starts: int = 2, sweeps: int = 20, tolerance: float = 1e-4
) -> tuple[Tensor, float, float]:
    """Search one row order for several matrices, such as all that meet in an MLP's hidden layer (``down`` transposed).

    Costs of an assignment add up over matrices, so the steps of :func:`search_permutations` carry over as they are.

    Args:
        matrices: Weights (rows, columns) with equally many rows, each with its two-site spec, none padded.
        starts: Number of initial orders: 1 for the one given, 2 for near-parallel rows gathered as well.
        sweeps: At most so many rounds of fits and assignments from each.
        tolerance: A round that lowers the error by less than this fraction of it is the last.

    Returns:
        The order, int64, (rows,), and ``√Σ‖W[order] − Ŵ‖² / √Σ‖W‖²`` with it and without; the first is never the
        larger.

    Raises:
        SpecError: A spec has not two sites or pads its weight, or the matrices differ in their number of rows.
    """
    specs: list[Spec] = []
    for weight, spec in matrices:
        if not isinstance(spec, Spec) or spec.sites != 2 or spec.is_padded:
            raise SpecError(f"search_row_order: got {spec}; needed a chain of two sites, of modes without padding.")
        specs.append(spec)
        if len(weight) != len(matrices[0][0]):
            raise SpecError(f"search_row_order: {len(weight)} rows beside {len(matrices[0][0])}; needed equally many.")
    weights = [
        check_weight(weight, spec).detach().to("cpu", torch.float64)
        for (weight, _), spec in zip(matrices, specs, strict=True)
    ]
    norm = math.sqrt(sum(float(w.square().sum()) for w in weights)) or 1.0

    def refit(order: Tensor) -> tuple[list[Tensor], float]:
        """Fits of all matrices in an order, multiplied out, and their relative error together."""
        dense = [to_dense(tt_svd(w[order], spec), spec) for w, spec in zip(weights, specs, strict=True)]
        squared = sum(float((w[order] - d).square().sum()) for w, d in zip(weights, dense, strict=True))
        return dense, math.sqrt(squared) / norm

    identity = torch.arange(len(weights[0]))
    without = refit(identity)[1]
    best, error = identity, without
    block = max(spec.out_modes[1] for spec in specs)
    for start in (identity, _gathered(torch.cat(weights, dim=1), block))[:starts]:
        order, (dense, reached) = start, refit(start)
        for _ in range(sweeps):
            moved = _assign(torch.stack([d @ w.T for d, w in zip(dense, weights, strict=True)]).sum(0))
            again, after = refit(moved)
            gained = reached - after
            if gained <= 0:
                break
            order, dense, reached = moved, again, after
            if gained < tolerance * after:
                break
        if reached < error:
            best, error = order, reached
    return best, error, without


def _initial_orders(w: Tensor, spec: Spec, rows: bool, columns: bool, starts: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Row and column orders to start a search from, int64; a side that may not move keeps its own."""
    stay = torch.arange(w.shape[0]), torch.arange(w.shape[1])
    for start in range(starts):
        if start == 0:
            orders = stay
        elif start == 1:
            orders = _gathered(w, spec.out_modes[1]), _gathered(w.T, spec.in_modes[1])
        elif start == 2:
            # A ⊗ B has singular vectors u_A ⊗ u_B: sorting by them brings the rows of a block together.
            u, _, vh = torch.linalg.svd(w, full_matrices=False)
            sign = torch.where(u[u[:, 0].abs().argmax(), 0] < 0, -1.0, 1.0)
            orders = (sign * u[:, 0]).argsort(stable=True), (sign * vh[0]).argsort(stable=True)
        else:
            generator = torch.Generator().manual_seed(start)
            orders = torch.randperm(w.shape[0], generator=generator), torch.randperm(w.shape[1], generator=generator)
        yield orders[0] if rows else stay[0], orders[1] if columns else stay[1]


def _gathered(w: Tensor, block: int) -> Tensor:
    """Order (rows,) that puts the most nearly parallel rows into blocks, greedily, the shorter rows of a block first.

    Rows of one block of A ⊗ B are parallel where B has a single column; elsewhere it is a heuristic.
    """
    norms = torch.linalg.vector_norm(w, dim=1)
    unit = w / norms.clamp_min(torch.finfo(w.dtype).tiny)[:, None]
    cosines = (unit @ unit.T).abs()
    free = torch.ones(len(w), dtype=torch.bool)
    order = []
    for seed in norms.argsort(descending=True, stable=True):
        if free[seed]:
            likeness = cosines[seed].where(free, -1.0)
            likeness[seed] = 2.0
            members = likeness.topk(block).indices
            free[members] = False
            order.append(members[norms[members].argsort(stable=True)])
    return torch.cat(order)


def _descend(
    w: Tensor,
    spec: Spec,
    row_order: Tensor,
    column_order: Tensor,
    rows: bool,
    columns: bool,
    sweeps: int,
    tolerance: float,
) -> tuple[float, Tensor, Tensor]:
    """Alternate fits and assignments from one start; return the error and the orders that they end in."""

    def refit() -> Tensor:
        return to_dense(tt_svd(w[row_order][:, column_order], spec), spec)

    dense = refit()
    error = _relative(w[row_order][:, column_order], dense)
    for _ in range(sweeps):
        kept = row_order, column_order
        if rows:
            row_order = _assign(dense @ w[:, column_order].T)
            dense = refit()
        if columns:
            column_order = _assign(dense.T @ w[row_order])
            dense = refit()
        after = _relative(w[row_order][:, column_order], dense)
        if not after < error:  # equally good orders, told apart by rounding
            return error, *kept
        gained = error - after
        error = after
        if gained < tolerance * error:
            break
    return error, row_order, column_order


def _assign(similarity: Tensor) -> Tensor:
    """Linear assignment: the order (n,) with the largest sum of ``similarity[slot, order[slot]]``, similarity (n, n).

    With inner products of rows for similarities it minimises squared distances, since norms do not depend on the order.
    """
    from scipy.optimize import linear_sum_assignment  # costs most of a second, and few commands need it

    return torch.from_numpy(linear_sum_assignment(similarity.numpy(), maximize=True)[1]).long()


def _relative(w: Tensor, dense: Tensor) -> float:
    """Relative error ``‖W − Ŵ‖_F / ‖W‖_F``; 0 if W is zero."""
    norm = torch.linalg.vector_norm(w)
    return float(torch.linalg.vector_norm(w - dense) / norm) if norm > 0 else 0.0
