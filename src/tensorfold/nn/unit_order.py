"""One order of an MLP's hidden units for the matrices that meet there, so that none has to bring them into its own.

Hidden units may lie in any order. In the one that is given here, the pivots of a matrix whose outputs they are come one
behind the other, the units that an MLP has lost come last, and the matrix that reads them reads the first ones as they
lie: :mod:`tensorfold.algebra.contraction.pivots` says what that saves. Nothing else changes, neither what is computed
nor what is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensorfold.algebra.solvers.pivots import with_pivots
from tensorfold.nn.base import FoldedModule

_WORSE = 2.0  # times the norm of T that other pivots may cost; a larger T magnifies the rounding of the pivots


@torch.no_grad()
def order_units(ups: Sequence[Any], down: Any) -> bool:
    """Bring the hidden units of a folded MLP into the order of the module's docstring, in place.

    Args:
        ups: The one or two expanding layers, whose outputs the units are.
        down: The contracting layer, which reads them.

    Returns:
        False, and nothing is changed, where a layer is of a kind whose outputs or inputs are in an order of its own,
        or none has an order to save.
    """
    folded = [layer for layer in (*ups, down) if _is_folded(layer)]
    if not any(layer.spec.reordered for layer in folded if layer is not down or "in" in layer.spec.reordered):
        return False
    if not all(_movable(layer) for layer in (*ups, down)):
        return False
    units = down.in_features if _is_folded(down) else _weight(down).shape[1]
    lost = {_lost(layer) for layer in ups if _is_folded(layer) and "out" in layer.spec.reordered}
    if len(lost) > 1:
        return False
    gone = torch.tensor(sorted(lost.pop() if lost else ()), dtype=torch.int64)
    order: list[Tensor] = []
    for layer in ups:
        if _is_folded(layer) and layer.spec.has_pivot_rows:
            taken = torch.cat(order) if order else gone[:0]
            own = _pivots(layer)
            if torch.isin(own, taken).any():
                _choose_pivots(layer, taken)
                own = _pivots(layer)
            if not torch.isin(own, taken).any():
                order.append(own)
    first = torch.cat(order) if order else gone[:0]
    rest = torch.ones(units, dtype=torch.bool)
    rest[first] = rest[gone] = False
    whole = torch.cat([first, rest.nonzero()[:, 0], gone])
    for layer in ups:
        _order_outputs(layer, whole)
    _order_inputs(down, whole)
    return True


def _is_folded(layer: nn.Module) -> bool:
    return isinstance(layer, FoldedModule)


def _movable(layer: Any) -> bool:
    """Whether outputs and inputs of a layer may change places: dense, in part or whole, or low rank with pivots."""
    if not _is_folded(layer):
        weight = getattr(layer, "weight", None)
        return isinstance(weight, Tensor) and weight.dim() == 2
    spec = layer.spec
    return bool(spec.is_chain and (spec.has_pivot_rows or (spec.sites == 1 and spec.is_partial)))


def _weight(layer: Any) -> Tensor:
    """The weight of a dense layer, (out, in), also of one that stores it transposed."""
    weight: Tensor = layer.weight.detach()
    return weight if isinstance(layer, nn.Linear) else weight.T


def _give_weight(layer: Any, weight: Tensor) -> None:
    """Give a dense layer a new weight, (out, in).

    As a new parameter: the old one may be mapped from a file, and what is written to that is lost with its pages
    (:class:`tensorfold.models.residency.OneBlock`).
    """
    stored = weight if isinstance(layer, nn.Linear) else weight.T
    layer.weight = nn.Parameter(stored.contiguous(), requires_grad=layer.weight.requires_grad)


def _position(layer: Any) -> Tensor:
    position: Tensor = layer.out_position
    return position.cpu()


def _made(layer: Any) -> int:
    return int(layer.spec.kept_sizes[0])


def _lost(layer: Any) -> tuple[int, ...]:
    """Outputs that are zero."""
    return tuple((_position(layer) >= _made(layer)).nonzero()[:, 0].tolist())


def _pivots(layer: Any) -> Tensor:
    """Outputs that are pivots, in their order."""
    position, rank = _position(layer), layer.spec.ranks[0]
    found = (position < rank).nonzero()[:, 0]
    return found[position[found].argsort()]


def _choose_pivots(layer: Any, taken: Tensor) -> None:
    """Take other outputs than those taken for pivots, in place, unless too few are left or they are much worse."""
    position, rank, made = _position(layer), layer.spec.ranks[0], _made(layer)
    row_of = position.clone()
    among = torch.ones(made, dtype=torch.bool)
    among[row_of[taken]] = False
    if int(among.sum()) < rank:
        return
    mixing, pivots = (core.detach() for core in layer.cores)
    eye = torch.eye(rank, dtype=torch.float64)
    top = torch.cat([eye, mixing[0, :, 0].cpu().double()])[None, :, None]  # (1, made, 1, r)
    cores, order = with_pivots([top, pivots.cpu().double()], among.nonzero()[:, 0])
    new = cores[0][:, rank:]
    if new.norm() > _WORSE * mixing.cpu().double().norm() + rank**0.5:
        return
    place = torch.cat([order.argsort(), torch.tensor([made])])  # new row of each old one
    layer.cores[0].copy_(new)
    layer.cores[1].copy_(cores[1])
    layer.out_position.copy_(place[position])


def _order_outputs(layer: Any, order: Tensor) -> None:
    """``order``: old output at each place, int64, (out,)."""
    bias = getattr(layer, "bias", None)
    if bias is not None:
        bias.copy_(bias[order.to(bias.device)])
    if not _is_folded(layer):
        weight = _weight(layer)
        _give_weight(layer, weight[order.to(weight.device)])
        return
    position, made = _position(layer)[order], _made(layer)
    rank = layer.spec.ranks[0] if layer.spec.has_pivot_rows else 0
    others = (position >= rank) & (position < made)
    core = layer.cores[0]
    core.copy_(core[:, (position[others] - rank).to(core.device)])
    position[others] = torch.arange(rank, made)
    layer.out_position.copy_(position)


def _order_inputs(layer: Any, order: Tensor) -> None:
    """``order``: old input at each place, int64, (in,)."""
    if not _is_folded(layer):
        weight = _weight(layer)
        _give_weight(layer, weight[:, order.to(weight.device)])
        return
    core = layer.cores[-1]  # (…, columns, 1)
    columns = order
    if layer.in_order is not None:
        reads = order.argsort()[layer.in_order.cpu()]
        columns = reads.argsort()
        layer.in_order.copy_(reads[columns])
    core.copy_(core[:, :, columns.to(core.device)])
