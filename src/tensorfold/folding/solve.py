"""One matrix solved: from a dense weight and what is known of it to the state of the module that takes its place."""

from __future__ import annotations

import torch
from torch import Tensor

from tensorfold.algebra.solvers.solve import Factors, relative_error
from tensorfold.algebra.specs.structure import Structure
from tensorfold.algebra.statistics import Metrics, Statistics
from tensorfold.errors import SpecError
from tensorfold.folding.plan import Plan
from tensorfold.hf.modules import empty_module, solved_module
from tensorfold.methods.base import NOTHING
from tensorfold.models.anatomy import Matrix, dense_weight
from tensorfold.nn import StructuredLinear
from tensorfold.utils.distributed import Ranks

# Key of the relative error, a fp64 scalar that travels from rank to rank beside the state of a solved module.
ERROR = "relative error"


def cost_of(matrix: Matrix) -> int:
    """Multiply–adds of a decomposition, up to a constant."""
    return matrix.parameter.numel() * min(matrix.out_features, matrix.in_features)


def solve_matrix(matrix: Matrix, planned: Plan, known: Statistics) -> dict[str, Tensor]:
    """The state of the module that replaces the matrix, and the relative error."""
    spec, method = planned.modules[matrix.name], planned.methods[matrix.name]
    weight = dense_weight(matrix.module).detach() if known.target is None else known.target
    try:
        factors = method.solve(weight, spec, known)
    except SpecError as error:
        raise SpecError(f"{matrix.name}: {error}") from None
    return _state(matrix, planned, factors, weight, known)


def solve_rows(ranks: Ranks, matrix: Matrix, planned: Plan) -> dict[str, Tensor]:
    """The same of a table whose rows are fitted by themselves, as many by every rank."""
    spec, method = planned.modules[matrix.name], planned.methods[matrix.name]
    weight = dense_weight(matrix.module).detach()
    share = -(-spec.out_features // ranks.count)
    parts = [range(first, min(first + share, spec.out_features)) for first in range(0, spec.out_features, share)]

    def solve(part: range) -> dict[str, Tensor]:
        cores = method.solve(weight[part.start : part.stop], spec.of_rows(len(part))).cores
        return {str(k): core for k, core in enumerate(cores)}

    def unsolved(part: range) -> dict[str, Tensor]:
        dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
        shapes = spec.of_rows(len(part)).core_shapes
        return {str(k): weight.new_empty(shape, dtype=dtype) for k, shape in enumerate(shapes)}

    solved = dict(ranks.share(parts, len, solve, unsolved))
    cores = [torch.cat([solved[part][str(k)] for part in parts]) for k in range(len(spec.core_shapes))]
    return _state(matrix, planned, Factors(cores), weight, NOTHING)


def _state(matrix: Matrix, planned: Plan, factors: Factors, weight: Tensor, known: Statistics) -> dict[str, Tensor]:
    spec, method = planned.modules[matrix.name], planned.methods[matrix.name]
    folded = solved_module(matrix, spec, factors)
    if known.means is not None and isinstance(folded, StructuredLinear) and folded.bias is not None:
        given, wanted = known.means
        folded.bias.data += (wanted - folded.to_dense(torch.float64) @ given.double()).to(folded.bias.dtype)
    metrics = known.metrics() if matrix.kind == "linear" or method.fits_text else Metrics()
    reached = relative_error(weight, folded.to_dense(torch.float64), *metrics)
    return {**folded.state_dict(), ERROR: torch.tensor(reached, dtype=torch.float64)}


def unsolved_state(matrix: Matrix, spec: Structure, device: torch.device) -> dict[str, Tensor]:
    """Uninitialised memory for what :func:`solve_matrix` returns."""
    state = empty_module(matrix, spec).to_empty(device=device).state_dict()
    return {**state, ERROR: torch.empty((), dtype=torch.float64)}
