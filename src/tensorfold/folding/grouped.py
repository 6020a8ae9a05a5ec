"""Groups of columns, or of rows, with one basis: a shape that a search may give a matrix instead of low rank.

m out, n in, g groups, r bond, w = n / g or m / g
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tensorfold.algebra.solvers.shared_basis import fit_shared_basis
from tensorfold.algebra.specs.spec import Spec
from tensorfold.folding.budgets import Choice, low_rank_spec
from tensorfold.models.anatomy import Matrix
from tensorfold.models.solvable import solvable_weight

_GROUPS = (2, 3, 4)  # of columns, or of rows where there are more of them
_ROUNDS = 4  # of a candidate shape: what it gains later decides nothing


def can_be_grouped(matrix: Matrix) -> bool:
    """Whether its longer side divides into any of the numbers of groups that are tried."""
    return any(max(matrix.out_features, matrix.in_features) % groups == 0 for groups in _GROUPS)


def spec_of(matrix: Matrix, choice: Choice) -> Spec:
    """The structure that a choice gives the matrix."""
    if choice.groups == 1:
        return low_rank_spec(matrix, choice.rank, choice.rows, choice.columns)
    return _groups_spec(matrix, choice.groups, choice.rank)


def nearest_shape(
    matrix: Matrix, choice: Choice, curve: Tensor, input_moment: Tensor, gradient_moment: Tensor
) -> tuple[Choice, list[Tensor]]:
    """The choice with groups where that is nearer than low rank of the same size, and then its cores; none otherwise.

    A shape whose matrices cannot have the rank that the error of low rank needs is not fitted: the curve bounds it.

    Args:
        curve: Squared errors of the best matrix of every rank 0 … min(m, n).
        input_moment, gradient_moment: C (n, n) and G (m, m).
    """
    weight = solvable_weight(matrix.module)
    best, cores, rivals = choice, [], dict(choice.rivals)
    bar = float((curve[choice.rank] / curve[0]) ** 0.5)
    for groups in _GROUPS:
        spec = _grouped(matrix, groups, choice.parameters)
        if spec is None or curve[spec.attainable_matrix_rank] >= curve[choice.rank]:
            continue
        fit = fit_shared_basis(weight, spec, input_moment, gradient_moment, rounds=_ROUNDS)
        rivals[str(spec)] = fit.error
        if fit.error < bar:
            bar, cores = fit.error, fit.cores
            best = replace(choice, rank=spec.ranks[0], groups=groups, parameters=spec.parameters)
    return replace(best, rivals=rivals), cores


def empty_cores(matrix: Matrix, choice: Choice) -> list[Tensor]:
    """Uninitialised memory for cores that another rank fitted to the matrix."""
    like = solvable_weight(matrix.module)
    dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
    return [torch.empty(shape, dtype=dtype, device=like.device) for shape in spec_of(matrix, choice).core_shapes]


def cores_of_first_rank(
    fitted: Mapping[str, list[Tensor]], choices: Mapping[str, Choice], members: Mapping[str, Matrix], is_first: bool
) -> dict[str, list[Tensor]]:
    """Cores of every choice with groups: those fitted here on the first rank, memory to receive them on the others."""
    grouped = [name for name in fitted if choices[name].groups > 1]
    return {name: fitted[name] if is_first else empty_cores(members[name], choices[name]) for name in grouped}


def _grouped(matrix: Matrix, groups: int, parameters: int) -> Spec | None:
    """The largest of so many parameters whose groups along the longer side share a basis, if there is one."""
    short, long = sorted((matrix.out_features, matrix.in_features))
    if long % groups:
        return None
    width = long // groups
    slope = short * groups + width
    bond = (slope - math.isqrt(max(0, slope * slope - 4 * parameters - 1)) - 1) // 2  # slope · r − r² in the budget
    bond = min(bond, width - 1, short * groups)
    return _groups_spec(matrix, groups, bond) if bond > 0 else None


def _groups_spec(matrix: Matrix, groups: int, bond: int) -> Spec:
    short, long = sorted((matrix.out_features, matrix.in_features))
    spec = Spec((short, 1), (groups, long // groups), (bond,), reordered=("in",), pivoted=True)
    return spec if matrix.out_features <= matrix.in_features else spec.transposed
