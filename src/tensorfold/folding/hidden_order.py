"""One order of an MLP's hidden units for all matrices that meet there: for a better fit, and for speed afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tensorfold.algebra.orders.permutation import search_row_order
from tensorfold.algebra.statistics import Statistics
from tensorfold.folding.plan import Plan
from tensorfold.hf.surgery import HiddenUnits, hidden_units, reorder_hidden
from tensorfold.methods.base import NOTHING
from tensorfold.models.anatomy import Matrix, matrices
from tensorfold.models.solvable import solvable_weight
from tensorfold.nn.unit_order import order_units
from tensorfold.utils.distributed import Ranks


def align_hidden_units(
    ranks: Ranks,
    model: PreTrainedModel,
    batch: list[Matrix],
    planned: Plan,
    known: Mapping[str, Statistics],
    works_on: Callable[[str], None],
) -> dict[str, Statistics]:
    """Reorder the hidden units of the MLPs in a batch whose method asks for it, in place; one rank searches each.

    Returns:
        The statistics, in the new order of rows and columns.
    """
    reordered = {matrix.name for matrix in batch if planned.methods[matrix.name].reorders_hidden}
    aligned = dict(known)
    if not reordered:
        return aligned

    def members(units: HiddenUnits) -> list[Matrix]:
        return [matrix for matrix in (*units.ups, units.down) if matrix.name in reordered]

    def search(units: HiddenUnits) -> list[Tensor]:
        works_on(f"hidden units of {units.down.name}")
        views = []
        for matrix in members(units):
            weight, spec = solvable_weight(matrix.module), planned.modules[matrix.name]
            moment = known.get(matrix.name, NOTHING).input_moment
            if moment is not None:
                weight = weight * moment.diagonal().sqrt()  # the metric's scale of every input
            views.append((weight.T, spec.transposed) if matrix.name == units.down.name else (weight, spec))
        return [search_row_order(views)[0]]

    def unknown(units: HiddenUnits) -> list[Tensor]:
        return [torch.empty(units.down.in_features, dtype=torch.int64)]

    families = [units for units in hidden_units(model, matrices(model)) if members(units)]
    for units, (order,) in ranks.share(families, lambda units: units.down.in_features**3, search, unknown):
        reorder_hidden(units, order.to(units.down.parameter.device))
        for matrix in (*units.ups, units.down):
            if matrix.name in aligned:
                sides = {"columns": order} if matrix is units.down else {"rows": order}
                aligned[matrix.name] = aligned[matrix.name].reordered(**sides)
    return aligned


def unit_families(model: PreTrainedModel) -> list[tuple[list[str], str]]:
    """Names of the expanding layers and of the contracting one of every MLP whose hidden units can be reordered."""
    return [([up.name for up in units.ups], units.down.name) for units in hidden_units(model, matrices(model))]


def order_folded_units(model: PreTrainedModel, families: Iterable[tuple[list[str], str]]) -> None:
    """Bring the hidden units of folded MLPs into an order that no layer has to make up for, in place."""
    for ups, down in families:
        order_units([model.get_submodule(name) for name in ups], model.get_submodule(down))
