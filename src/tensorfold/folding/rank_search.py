"""The search on the dense model that decides the ranks of layers which share a budget.

Steps, in this order: gradient moments of the dense model; error curves of every layer, and of smaller value heads;
allocation of the budgets; other shapes of the same size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tensorfold.algebra.solvers.low_rank import error_curve
from tensorfold.algebra.statistics import shrunk
from tensorfold.calibration.block_stream import BlockStream, input_moments
from tensorfold.calibration.expert_moments import shrunk_experts
from tensorfold.calibration.packed_symmetric import Packed
from tensorfold.errors import InputError
from tensorfold.folding.budgets import (
    Change,
    Choice,
    Family,
    Smaller,
    divide,
    divide_plainly,
    searched,
    units_left,
)
from tensorfold.folding.found import Found, still_needed, turns
from tensorfold.folding.grouped import can_be_grouped, cores_of_first_rank, nearest_shape, spec_of
from tensorfold.folding.hidden_layers import HiddenLayer, hidden_layers
from tensorfold.folding.plan import Budget, Plan
from tensorfold.folding.stored_gradients import take_gradients
from tensorfold.folding.text import Text
from tensorfold.folding.value_heads import ValueHeads, free, value_heads
from tensorfold.methods.auto import EFFORTS, Effort
from tensorfold.models.anatomy import Matrix, by_block
from tensorfold.models.residency import WHOLE, Residency
from tensorfold.models.solvable import solvable_weight
from tensorfold.utils.block_checkpoints import BlockCheckpoints
from tensorfold.utils.distributed import Ranks

_FEW = 128  # tokens, of a look at logits
_BLOCK = 1  # of a checkpoint; that of the gradients is 0


def search_ranks(
    model: PreTrainedModel,
    planned: Plan,
    chosen: Mapping[str, Matrix],
    text: Text,
    ranks: Ranks,
    store: BlockCheckpoints | None = None,
    works_on: Callable[[str], None] = lambda _: None,
    residency: Residency = WHOLE,
) -> tuple[Plan, Found]:
    """Divide every budget of the plan among its layers; those outside the blocks keep their equal shares.

    On several ranks all measure, and take the choices of the first: on unequal machines the last digit may decide
    otherwise.

    Args:
        store: Gradients are read from its block 0 and choices from its block 1, or written there.
        works_on: Told what is being measured.
        residency: Which of the weights are in memory.

    Returns:
        The plan with the ranks chosen, without the layers that stay dense; and what was found on the way.
    """
    budgets = searched(model, planned)
    if text.windows is None or not budgets:
        return planned, Found()
    search = RankSearch(
        model, planned, chosen, budgets, text.windows, len(text.prefix), ranks, works_on, residency=residency
    )
    found = search.run(store)
    choices = found.choices.items()
    return planned.with_specs({n: None if c.dense else spec_of(chosen[n], c) for n, c in choices}), found


@dataclass(eq=False)
class RankSearch:
    """The search for the ranks of all budgets of a plan, on the dense model.

    Attributes:
        windows: Calibration text, shape (windows, length).
        prefix: How many tokens at the beginning of every window the tokenizer puts before a document.
        efforts: The effort of every layer that shares a budget.
        members: Those layers.
        sample: The windows that the search looks at, spread over the text if they are not all of it.
        gradients: Gradient moments of the members on the sample.
        curves: Squared errors of the best matrix of every rank, of the members that the sample meets. They are exact:
            eigenvalues give the error of the best matrix of every rank, so no rank is tried.
        families: Value heads of attention and hidden layers of MLPs, with their curves at smaller sizes.
    """

    model: PreTrainedModel
    planned: Plan
    chosen: Mapping[str, Matrix]
    budgets: list[Budget]
    windows: Tensor
    prefix: int
    ranks: Ranks
    works_on: Callable[[str], None]
    gradients: Mapping[str, Packed] = field(default_factory=dict)
    curves: dict[str, Tensor] = field(default_factory=dict)
    families: list[tuple[Family, list[Smaller]]] = field(default_factory=list)
    residency: Residency = field(default_factory=Residency)

    def __post_init__(self) -> None:
        self.efforts: dict[str, Effort] = {
            name: EFFORTS[budget.method.effort] for budget in self.budgets for name in budget.names
        }
        self.members = {name: self.chosen[name] for name in self.chosen if name in self.efforts}
        tokens = max((effort.gradient_tokens or self.windows.numel()) for effort in self.efforts.values())
        count = min(len(self.windows), -(-tokens // self.windows.shape[1]))
        self.sample = self.windows[torch.arange(count) * len(self.windows) // count]  # spread over the text's documents
        plain = [budget for budget in self.budgets if budget.method.plain]
        self.multiples = {name: budget.method.multiple for budget in self.budgets for name in budget.names}
        self.exact = {name: units_left(budget, self.members) for budget in plain for name in budget.names}

    def run(self, store: BlockCheckpoints | None) -> Found:
        """All steps, or what a checkpoint holds of them."""
        self.works_on("gradients")
        stored = take_gradients(self.model, self.sample, self.prefix, self.members, store, self.residency)
        self.gradients = stored.moments
        kept = store.load(_BLOCK) if store else None
        if kept is not None:
            return Found.restored(*kept, self.gradients, self.efforts, self.members)
        self.measure_curves()
        choices, bases = self.divide()
        gradients = still_needed(self.gradients, choices)
        choices, starts = self.try_shapes(choices)
        turned = turns(bases, choices, self.members)
        found = Found(gradients, self.efforts, choices, starts, turned, stored.folder)
        if store:
            store.save(_BLOCK, *found.checkpoint())
        return found

    def measure_curves(self) -> None:
        """Error curves of the members, and of value heads where their size may change the number of parameters."""
        # Orders of heads and units are stored, so that a budget of bytes would have to count them.
        counted = {name for budget in self.budgets if budget.method.budget != "bytes" for name in budget.names}
        stream = BlockStream(self.model, self.sample, self.residency.activations)
        for index, batch in _at_entrances(stream, self.members):
            self.works_on(f"curves of {stream.name}.{index}")
            modules = {name: matrix.module for name, matrix in batch.items()}
            able = {name: matrix for name, matrix in batch.items() if name in counted}
            pair = value_heads(stream, index, {n: m for n, m in able.items() if self.efforts[n].heads})
            layers = hidden_layers(
                stream, index, {n: m for n, m in able.items() if self.efforts[n].units or n in self.exact}
            )
            layers = [
                replace(layer, exact=self.exact.get(layer.down.name), multiple=self.multiples[layer.down.name])
                for layer in layers
            ]
            tokens: dict[str, int] = {}
            with stream.rounded():
                moments = input_moments(partial(stream.advance, index), modules, all_called=False, counts=tokens)
            moments = self._shrunk(shrunk_experts(moments, tokens, batch.values(), stream.width))
            for name, matrix in batch.items():
                if name in moments and name in self.gradients:
                    weight = solvable_weight(matrix.module)
                    self.curves[name] = error_curve(weight, moments[name], self.gradients[name].full())
            families: list[Family] = [*([pair] if pair is not None else []), *layers]
            for family in families:
                if {member.name for member in family.members} <= self.curves.keys():
                    self.families.append((family, family.smaller(moments, lambda name: self.gradients[name].full())))
        pairs = [family for family, _ in self.families if isinstance(family, ValueHeads)]
        bound = [pair for pair in pairs if pair not in free(self.model, self.sample[:1, :_FEW], pairs)]
        self.families = [(family, smaller) for family, smaller in self.families if family not in bound]

    def divide(self) -> tuple[dict[str, Choice], dict[str, Change]]:
        """What every layer is given, on every rank what the first one found; and the bases of smaller value heads."""
        choices: dict[str, Choice] = {}
        changes: dict[str, Change] = {}
        for budget in self._met():
            if budget.method.plain:
                divided, turned = divide_plainly(budget, self.members, self.curves, self._plain_layers(budget))
            else:
                divided, turned = divide(budget, self.planned, self.members, self.curves, self.families)
            choices |= divided
            changes |= turned
        self.families.clear()
        return self.ranks.gather((choices, changes) if self.ranks.is_first else None)[0]  # type: ignore[no-any-return]

    def try_shapes(self, choices: dict[str, Choice]) -> tuple[dict[str, Choice], dict[str, list[Tensor]]]:
        """The choices with another shape of the same size where that is nearer, and the cores of those.

        Groups take more bytes for their order than low rank, and more multiply–adds than they have parameters.
        """
        able = {name for budget in self.budgets if budget.method.budget == "parameters" for name in budget.names}
        tried = {
            name: self.members[name]
            for name, choice in choices.items()
            if name in able and self.efforts[name].shapes and can_be_grouped(self.members[name])
            if self.multiples[name] == 1
            if not (choice.dense or choice.rows or choice.columns)
        }
        fitted: dict[str, list[Tensor]] = {}
        stream = BlockStream(self.model, self.sample, self.residency.activations) if tried else None
        for index, batch in _at_entrances(stream, tried) if stream is not None else ():
            modules = {name: matrix.module for name, matrix in batch.items()}
            with stream.rounded():  # type: ignore[union-attr]
                advance = partial(stream.advance, index)  # type: ignore[union-attr]
                moments = self._shrunk(input_moments(advance, modules))
            for name, matrix in batch.items():
                self.works_on(f"shapes of {name}")
                curve, gradient = self.curves[name], self.gradients[name].full()
                choices[name], fitted[name] = nearest_shape(matrix, choices[name], curve, moments[name], gradient)
        choices = self.ranks.gather(choices if self.ranks.is_first else None)[0]
        starts = cores_of_first_rank(fitted, choices, self.members, self.ranks.is_first)
        self.ranks.broadcast((core for cores in starts.values() for core in cores), owner=0)
        return choices, starts

    def _plain_layers(self, budget: Budget) -> list[tuple[Family, Smaller]]:
        """The hidden layers of a budget that is to leave a plain model.

        Raises:
            InputError: An MLP of it cannot lose units.
        """
        found = [(family, smaller[0]) for family, smaller in self.families if family.members[-1].name in budget.names]
        found = [(family, smaller) for family, smaller in found if isinstance(family, HiddenLayer)]
        met = {member.name for family, _ in found for member in family.members}
        left = [name for name in budget.names if self.members[name].group == "mlp" and name not in met]
        if left:
            raise InputError(
                f"auto: plain, and the hidden units of {left[0]} do not work by themselves; leave out plain."
            )
        return found

    def _shrunk(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: shrunk(moment, self.efforts[name].shrink) for name, moment in moments.items()}

    def _met(self) -> list[Budget]:
        """Budgets without layers that no token of the sample reached, such as experts that none was sent to.

        Nothing is known of what those cost the loss; they keep their equal shares, and are fitted to their inputs
        alone.

        Raises:
            InputError: The rest of the text does not reach one either.
        """
        left = {name: matrix for name, matrix in self.members.items() if name not in self.curves}
        if left:
            stream = BlockStream(self.model, self.windows, self.residency.activations)
            needed = {name: matrix for name, matrix in left.items() if matrix.group != "experts"}  # have their layer's
            for index, batch in _at_entrances(stream, needed):
                # Found now, not when its block is folded; it names the layer.
                input_moments(partial(stream.advance, index), {name: matrix.module for name, matrix in batch.items()})
            more = " effort: medium looks at all of the text." if len(self.sample) < len(self.windows) else ""
            warnings.warn(
                f"{len(left)} layers are not called on {self.sample.numel()} tokens of the calibration text, "
                f"from {next(iter(left))} on; each gets an equal share of its budget, and is fitted to its inputs "
                f"without the loss's gradients.{more}",
                stacklevel=2,
            )
        met = [
            replace(budget, names=tuple(name for name in budget.names if name in self.curves))
            for budget in self.budgets
        ]
        return [budget for budget in met if budget.names]


def _at_entrances(stream: BlockStream, layers: Mapping[str, Matrix]) -> Iterator[tuple[int, dict[str, Matrix]]]:
    """The layers of every block that has any, with the stream at its entrance."""
    for index, batch in sorted(by_block(layers, stream.name).items()):
        stream.advance_to(index)
        yield index, batch
