"""One matrix solved: from a dense weight and what is known of it to the state of the module that takes its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorfold.algebra.solvers.solve import Factors, relative_error
from tensorfold.algebra.specs.structure import Structure
from tensorfold.algebra.statistics import Metrics, Statistics
from tensorfold.errors import SpecError
from tensorfold.folding.plan import Plan
from tensorfold.hf.modules import Folded, empty_module, solved_module
from tensorfold.methods.base import NOTHING
from tensorfold.models.anatomy import Matrix
from tensorfold.models.solvable import solvable_weight
from tensorfold.nn import StructuredLinear
from tensorfold.utils.distributed import Ranks

_ERROR = "relative error"  # key of the error in a checkpoint, beside the state


@dataclass(frozen=True, eq=False)
class Solved:
    """The module that takes a matrix's place, as its state, and how near it is; the tensors can go to other ranks.

    Attributes:
        state: The module's state dict.
        error: Relative error in the metrics of the fit, a fp64 scalar.
    """

    state: dict[str, Tensor]
    error: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        """Every tensor, in an order that is the same on all ranks."""
        yield from (*self.state.values(), self.error)

    def module(self, matrix: Matrix, spec: Structure) -> Folded:
        """The module itself, over these very tensors."""
        folded = empty_module(matrix, spec)
        folded.load_state_dict(self.state, assign=True)
        folded.requires_grad_(matrix.parameter.requires_grad)
        return folded

    def named(self, name: str) -> dict[str, Tensor]:
        """The tensors by names that begin with that of the matrix, for a checkpoint."""
        return {f"{name}.{key}": tensor for key, tensor in {**self.state, _ERROR: self.error}.items()}

    @classmethod
    def from_named(cls, name: str, tensors: Mapping[str, Tensor], device: torch.device) -> Solved:
        """The inverse of :meth:`named`, from tensors of several matrices; the state on ``device``."""
        prefix = f"{name}."
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        error = own.pop(_ERROR)
        return cls({key: value.to(device) for key, value in own.items()}, error)

    @classmethod
    def unsolved(cls, matrix: Matrix, spec: Structure, device: torch.device) -> Solved:
        """Uninitialised memory to receive what another rank solved."""
        state = empty_module(matrix, spec).to_empty(device=device).state_dict()
        return cls(state, torch.empty((), dtype=torch.float64))


def cost_of(matrix: Matrix) -> int:
    """Multiply–adds of a decomposition, up to a constant."""
    return matrix.parameter.numel() * min(matrix.out_features, matrix.in_features)


def solve_matrix(matrix: Matrix, planned: Plan, known: Statistics) -> Solved:
    """Fit the structure that is planned for a matrix to its weight, or to the target that ``known`` has in its place.

    Raises:
        SpecError: The structure cannot be filled; the message names the matrix.
    """
    spec, method = planned.modules[matrix.name], planned.methods[matrix.name]
    weight = solvable_weight(matrix.module) if known.target is None else known.target
    try:
        factors = method.solve(weight, spec, known)
    except SpecError as error:
        raise SpecError(f"{matrix.name}: {error}") from None
    return _solved(matrix, planned, factors, weight, known)


def solve_rows(ranks: Ranks, matrix: Matrix, planned: Plan) -> Solved:
    """Fit a table whose rows are fitted by themselves, an equal slice of them on every rank."""
    spec, method = planned.modules[matrix.name], planned.methods[matrix.name]
    weight = solvable_weight(matrix.module)
    share = -(-spec.out_features // ranks.count)
    parts = [range(first, min(first + share, spec.out_features)) for first in range(0, spec.out_features, share)]

    def solve(part: range) -> list[Tensor]:
        return method.solve(weight[part.start : part.stop], spec.of_rows(len(part))).cores

    def unsolved(part: range) -> list[Tensor]:
        dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
        return [weight.new_empty(shape, dtype=dtype) for shape in spec.of_rows(len(part)).core_shapes]

    solved = dict(ranks.share(parts, len, solve, unsolved))
    cores = [torch.cat(slices) for slices in zip(*(solved[part] for part in parts), strict=True)]
    return _solved(matrix, planned, Factors(cores), weight, NOTHING)


def _solved(matrix: Matrix, planned: Plan, factors: Factors, weight: Tensor, known: Statistics) -> Solved:
    spec, method = planned.modules[matrix.name], planned.methods[matrix.name]
    folded = solved_module(matrix, spec, factors, weight.device)
    if known.means is not None and isinstance(folded, StructuredLinear) and folded.bias is not None:
        given, wanted = known.means
        folded.bias.data += (wanted - folded.to_dense(torch.float64) @ given.double()).to(folded.bias.dtype)
    metrics = known.metrics() if matrix.kind == "linear" or method.fits_text else Metrics()
    reached = relative_error(weight, folded.to_dense(torch.float64), *metrics)
    state = {key: value.to(matrix.parameter.device) for key, value in folded.state_dict().items()}
    return Solved(state, torch.tensor(reached, dtype=torch.float64))
