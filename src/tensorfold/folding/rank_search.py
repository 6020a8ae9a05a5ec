"""How a budget is divided among the linear layers that share it, from what each costs the loss at every rank.

Steps, in this order: gradient moments of the dense model; error curves of every layer, and of smaller value heads;
allocation of the budgets; other shapes of the same size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel

from tensorfold.algebra.solvers.low_rank import error_curve
from tensorfold.algebra.solvers.smaller_heads import HeadBasis
from tensorfold.calibration.block_stream import BlockStream, input_moments
from tensorfold.calibration.packed_symmetric import Packed
from tensorfold.folding.budgets import Choice, Heads, divide, searched
from tensorfold.folding.found import Found, still_needed, turns
from tensorfold.folding.grouped import can_be_grouped, cores_of_first_rank, nearest_shape, spec_of
from tensorfold.folding.plan import Budget, Plan
from tensorfold.folding.stored_gradients import take_gradients
from tensorfold.folding.text import Text
from tensorfold.folding.value_heads import free, value_heads
from tensorfold.methods.auto import EFFORTS, Effort
from tensorfold.models.anatomy import Matrix, by_block, dense_weight
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
) -> tuple[Plan, Found]:
    """Divide every budget of the plan among its layers; those outside the blocks keep their equal shares.

    On several ranks all measure, and take the choices of the first: on unequal machines the last digit may decide
    otherwise.

    Args:
        store: Gradients are read from its block 0 and choices from its block 1, or written there.
        works_on: Told what is being measured.

    Returns:
        The plan with the ranks chosen, without the layers that stay dense; and what was found on the way.
    """
    budgets = searched(model, planned)
    if text.windows is None or not budgets:
        return planned, Found()
    found = RankSearch(model, planned, chosen, budgets, text.windows, len(text.prefix), ranks, works_on).run(store)
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
        sample: The windows that the search looks at.
        gradients: Gradient moments of the members on the sample.
        curves: Squared errors of the best matrix of every rank, of the members that the sample meets. They are exact:
            eigenvalues give the error of the best matrix of every rank, so no rank is tried.
        heads: Values and outputs of attention with their curves at smaller sizes of the heads.
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
    heads: list[Heads] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.efforts: dict[str, Effort] = {
            name: EFFORTS[budget.method.effort] for budget in self.budgets for name in budget.names
        }
        self.members = {name: self.chosen[name] for name in self.chosen if name in self.efforts}
        tokens = max((effort.gradient_tokens or self.windows.numel()) for effort in self.efforts.values())
        self.sample = self.windows[: -(-tokens // self.windows.shape[1])]

    def run(self, store: BlockCheckpoints | None) -> Found:
        """All steps, or what a checkpoint holds of them."""
        self.works_on("gradients")
        stored = take_gradients(self.model, self.sample, self.prefix, self.members, store)
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
        shrinking = {
            name
            for budget in self.budgets
            if budget.method.budget != "bytes"
            for name in budget.names
            if self.efforts[name].heads
        }
        stream = BlockStream(self.model, self.sample)
        for index, batch in _at_entrances(stream, self.members):
            self.works_on(f"curves of {stream.name}.{index}")
            modules = {name: matrix.module for name, matrix in batch.items()}
            pair = value_heads(stream, index, {name: matrix for name, matrix in batch.items() if name in shrinking})
            moments = input_moments(partial(stream.advance, index), modules, all_called=False)
            for name, matrix in batch.items():
                if name in moments and name in self.gradients:
                    weight = dense_weight(matrix.module).detach()
                    self.curves[name] = error_curve(weight, moments[name], self.gradients[name].full())
            if pair is not None and {pair.values.name, pair.outputs.name} <= self.curves.keys():
                self.heads.append((pair, pair.shrunken(moments, lambda name: self.gradients[name].full())))
        own = free(self.model, self.sample[:1, :_FEW], [pair for pair, _ in self.heads])
        self.heads = [(pair, shrunken) for pair, shrunken in self.heads if pair in own]

    def divide(self) -> tuple[dict[str, Choice], dict[str, HeadBasis]]:
        """What every layer is given, on every rank what the first one found; and the bases of smaller value heads."""
        choices: dict[str, Choice] = {}
        bases: dict[str, HeadBasis] = {}
        for budget in self._met():
            divided, turned = divide(budget, self.planned, self.members, self.curves, self.heads)
            choices |= divided
            bases |= turned
        self.heads.clear()
        return self.ranks.gather((choices, bases) if self.ranks.is_first else None)[0]  # type: ignore[no-any-return]

    def try_shapes(self, choices: dict[str, Choice]) -> tuple[dict[str, Choice], dict[str, list[Tensor]]]:
        """The choices with another shape of the same size where that is nearer, and the cores of those.

        Groups take more bytes for their order than low rank, and more multiply–adds than they have parameters.
        """
        able = {name for budget in self.budgets if budget.method.budget == "parameters" for name in budget.names}
        tried = {
            name: self.members[name]
            for name, choice in choices.items()
            if name in able and self.efforts[name].shapes and can_be_grouped(self.members[name])
            if not (choice.dense or choice.rows or choice.columns)
        }
        fitted: dict[str, list[Tensor]] = {}
        stream = BlockStream(self.model, self.sample) if tried else None
        for index, batch in _at_entrances(stream, tried) if stream is not None else ():
            moments = input_moments(
                partial(stream.advance, index),  # type: ignore[union-attr]
                {name: matrix.module for name, matrix in batch.items()},
            )
            for name, matrix in batch.items():
                self.works_on(f"shapes of {name}")
                curve, gradient = self.curves[name], self.gradients[name].full()
                choices[name], fitted[name] = nearest_shape(matrix, choices[name], curve, moments[name], gradient)
        choices = self.ranks.gather(choices if self.ranks.is_first else None)[0]
        starts = cores_of_first_rank(fitted, choices, self.members, self.ranks.is_first)
        self.ranks.broadcast((core for cores in starts.values() for core in cores), owner=0)
        return choices, starts

    def _met(self) -> list[Budget]:
        """Budgets without layers that no token of the sample reached, such as experts that none was sent to.

        Nothing is known of what those cost the loss; they keep their equal shares, and are fitted to their inputs
        alone.

        Raises:
            InputError: The rest of the text does not reach one either.
        """
        left = {name: matrix for name, matrix in self.members.items() if name not in self.curves}
        if left:
            stream = BlockStream(self.model, self.windows)
            for index, batch in _at_entrances(stream, left):
                # Found now, not when its block is folded; it names the layer.
                input_moments(partial(stream.advance, index), {name: matrix.module for name, matrix in batch.items()})
            warnings.warn(
                f"{len(left)} layers are not called on the first {self.sample.numel()} tokens of the calibration text, "
                f"from {next(iter(left))} on; each gets an equal share of its budget, and is fitted to its inputs "
                "without the loss's gradients. effort: high looks at all of the text.",
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
