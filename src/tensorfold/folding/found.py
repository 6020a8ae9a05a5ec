"""What a search finds out about the layers that share a budget, before the first of them is folded."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from tensorfold.algebra.solvers.fewer_units import KeptUnits
from tensorfold.algebra.solvers.smaller_heads import HeadBasis
from tensorfold.algebra.statistics import Statistics, shrunk
from tensorfold.calibration.packed_symmetric import Packed
from tensorfold.folding.budgets import Change, Choice
from tensorfold.folding.value_heads import Turn
from tensorfold.methods.auto import Effort
from tensorfold.models.anatomy import Matrix


@dataclass(frozen=True, eq=False)
class Found:
    """What is known of the layers that share a budget; empty without text.

    Attributes:
        gradients: Gradient moments of those that are folded, taken once from the dense model.
        efforts: The effort of every such layer.
        choices: What each was given, of those that the text of the search met.
        starts: Cores that were fitted to the dense model, of layers with other shapes than low rank.
        turns: How layers shrink whose value heads or hidden units become fewer.
        folder: Holds the files of ``gradients``, and is removed with this object.
    """

    gradients: dict[str, Packed] = field(default_factory=dict)
    efforts: dict[str, Effort] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)
    starts: dict[str, list[Tensor]] = field(default_factory=dict)
    turns: dict[str, Turn] = field(default_factory=dict)
    folder: tempfile.TemporaryDirectory[str] | None = None

    def completed(self, matrix: Matrix, known: Statistics) -> Statistics:
        """The statistics with all that the search knows of the matrix, which is then forgotten here.

        All gradient moments together are as large as half the model.
        """
        packed = self.gradients.pop(matrix.name, None)
        moment = None if packed is None else packed.full()
        known = replace(known, gradient_moment=moment, start=self.starts.pop(matrix.name, None))
        effort = self.efforts.get(matrix.name)
        if effort is not None and known.input_moment is not None:
            known = replace(known, input_moment=shrunk(known.input_moment, effort.shrink))
        turn = self.turns.get(matrix.name)
        return known if turn is None else turn.statistics(matrix, known)

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON that :meth:`restored` makes it from again; the gradients are in files of their own."""
        tensors = {f"{name}.{k}": core for name, cores in self.starts.items() for k, core in enumerate(cores)}
        for name, turn in self.turns.items():
            tensors |= {f"{name}.{key}": tensor for key, tensor in turn.basis.tensors().items()}
        return tensors, {name: asdict(choice) for name, choice in self.choices.items()}

    @classmethod
    def restored(
        cls,
        tensors: Mapping[str, Tensor],
        choices: Mapping[str, Any],
        gradients: Mapping[str, Packed],
        efforts: dict[str, Effort],
        members: Mapping[str, Matrix],
    ) -> Found:
        """The object that :meth:`checkpoint` was asked of.

        Args:
            gradients: Gradient moments of all layers that share a budget.
            members: Those layers.
        """
        made = {name: Choice(**choice) for name, choice in choices.items()}
        starts = {name: [tensors[f"{name}.{k}"] for k in range(2)] for name in made if f"{name}.0" in tensors}
        changes: dict[str, Change] = {}
        for name in made:
            if f"{name}.into" in tensors:
                changes[name] = HeadBasis(tensors[f"{name}.into"], tensors[f"{name}.back"])
            elif f"{name}.stays" in tensors:
                changes[name] = KeptUnits(tensors[f"{name}.stays"])
        return cls(still_needed(gradients, made), efforts, made, starts, turns(changes, made, members))


def still_needed(gradients: Mapping[str, Packed], choices: Mapping[str, Choice]) -> dict[str, Packed]:
    """The gradient moments of layers that are folded."""
    return {name: packed for name, packed in gradients.items() if name in choices and not choices[name].dense}


def turns(
    changes: Mapping[str, Change], choices: Mapping[str, Choice], members: Mapping[str, Matrix]
) -> dict[str, Turn]:
    """The changes as each of their layers meets them, on the devices of the layers."""
    return {
        name: Turn(change.to(members[name].parameter.device), of_values=choices[name].rows > 0)
        for name, change in changes.items()
    }
