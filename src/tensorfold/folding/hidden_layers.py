"""Hidden layers of MLPs that a search may make narrower."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensorfold.algebra.solvers.fewer_units import KeptUnits, compensated, eliminate
from tensorfold.algebra.solvers.low_rank import error_curve
from tensorfold.calibration.block_calls import input_of
from tensorfold.calibration.block_stream import BlockStream
from tensorfold.folding.budgets import Smaller
from tensorfold.hf.surgery import hidden_units
from tensorfold.models.anatomy import Matrix
from tensorfold.models.solvable import solvable_weight

_STEPS = 48  # sizes of the whole that are looked at, and of those every sixth with lower ranks as well
_WITH_RANKS = 6
_LEAST = 3 / 8  # of the units
_EXACT, _ROUNDED = 1e-4, 0.02  # of what the units' own outputs do, in fp32 and in less


@dataclass(frozen=True)
class HiddenLayer:
    """The matrices that meet in one MLP's hidden layer: rows of ``ups``, columns of ``down``.

    Attributes:
        exact: The one number of units that is asked for; None to look at several.
        multiple: What divides the numbers that are looked at.
    """

    ups: tuple[Matrix, ...]
    down: Matrix
    exact: int | None = None
    multiple: int = 1

    @property
    def members(self) -> tuple[Matrix, ...]:
        """The expanding matrices, then the contracting one."""
        return (*self.ups, self.down)

    @property
    def whole(self) -> int:
        """Hidden units."""
        return self.down.in_features

    def kept(self, matrix: Matrix, size: int) -> tuple[int, int]:
        """Rows and columns of a member that are left with ``size`` units; 0 is all."""
        if size == self.whole:
            return 0, 0
        return (0, size) if matrix is self.down else (size, 0)

    def smaller(self, moments: Mapping[str, Tensor], gradients: Callable[[str], Tensor]) -> list[Smaller]:
        """Curves with fewer units, from second moments of inputs and gradients by name."""
        weight, moment = solvable_weight(self.down.module), moments[self.down.name]
        gradient = gradients(self.down.name)
        sizes = sorted({self._rounded(k): k for k in range(int(_STEPS * _LEAST), _STEPS)}.items())
        sizes = sizes if self.exact is None else [(self.exact, 1)]
        elimination = eliminate(weight, moment, gradient, max(1, sizes[0][0]))
        found = []
        for size, step in sizes:
            if not 0 < size < self.whole:
                continue
            stays = torch.zeros(self.whole, dtype=torch.bool)
            kept = elimination.kept(size)
            stays[kept] = True
            lost = elimination.losses[size]
            if step % _WITH_RANKS:
                curves = tuple(_full_rank(matrix, *self.kept(matrix, size), lost) for matrix in self.members)
            else:
                kept = kept.to(weight.device)
                inner = moment[kept][:, kept]
                down = error_curve(compensated(weight, moment, kept), inner, gradient) + lost
                ups = (
                    error_curve(
                        solvable_weight(matrix.module)[kept],
                        moments[matrix.name],
                        gradients(matrix.name)[kept][:, kept],
                    )
                    for matrix in self.ups
                )
                curves = (*ups, down)
            found.append(Smaller(size, curves, KeptUnits(stays), full_only=bool(step % _WITH_RANKS)))
        return found

    def _rounded(self, step: int) -> int:
        size = self.whole * step // _STEPS
        return size - size % self.multiple


def hidden_layers(stream: BlockStream, index: int, matrices: Mapping[str, Matrix]) -> list[HiddenLayer]:
    """Hidden layers of block ``index`` whose matrices are all among ``matrices``, and whose units work by themselves.

    Args:
        stream: At the entrance of the block.
    """
    found = [HiddenLayer(tuple(units.ups), units.down) for units in hidden_units(stream.model, matrices)]
    return [layer for layer in found if layer.whole >= 2 and _by_themselves(stream, index, layer)]


def _full_rank(matrix: Matrix, rows: int, columns: int, lost: Tensor) -> Tensor:
    """Squared errors of which only that of the full rank is known: what dropping the units loses, once a family."""
    ranks = min(rows or matrix.out_features, columns or matrix.in_features)
    losses = torch.full((ranks + 1,), torch.inf, dtype=torch.float64)
    losses[-1] = lost if columns else 0.0
    return losses


def _by_themselves(stream: BlockStream, index: int, layer: HiddenLayer) -> bool:
    """Whether units that are silenced leave all others as they are: a norm or softmax over the units would not."""
    half = torch.arange(layer.whole) % 2 == 0

    def silence(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        x = input_of(args, kwargs)
        return (x * half.to(x),), {}

    def drop(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output * half.to(output)

    with torch.no_grad(), ExitStack() as hooks:
        before = stream.run(index, slice(0, 1)).float()
        hooks.callback(layer.down.module.register_forward_pre_hook(silence, with_kwargs=True).remove)
        silenced = stream.run(index, slice(0, 1)).float()
        for matrix in layer.ups:
            hooks.callback(matrix.module.register_forward_hook(drop).remove)
        dropped = stream.run(index, slice(0, 1)).float()
    exact = layer.down.parameter.dtype in (torch.float32, torch.float64)
    allowed = (_EXACT if exact else _ROUNDED) * (silenced - before).norm()
    return bool((dropped - silenced).norm() <= allowed)
