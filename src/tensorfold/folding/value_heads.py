"""Value heads that a search may make smaller: which matrices hold them, and what changes with their basis."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tensorfold.algebra.precision import solvable
from tensorfold.algebra.solvers.smaller_heads import Known, shrunken_heads
from tensorfold.algebra.statistics import Means, Statistics
from tensorfold.calibration.block_calls import input_of
from tensorfold.calibration.block_stream import BlockStream
from tensorfold.folding.budgets import Change, Smaller
from tensorfold.models.anatomy import Matrix
from tensorfold.models.solvable import solvable_weight

_EXACT, _ROUNDED = 1e-3, 0.05  # of what the change of one side alone does, in fp32 and in less


@dataclass(frozen=True)
class ValueHeads:
    """The matrices of a block's attention whose heads share a basis: rows of ``values``, columns of ``outputs``."""

    values: Matrix
    outputs: Matrix
    heads: int

    @property
    def members(self) -> tuple[Matrix, ...]:
        """Values, then outputs."""
        return self.values, self.outputs

    @property
    def whole(self) -> int:
        """Dimensions of a head."""
        return self.outputs.in_features // self.heads

    @property
    def groups(self) -> int:
        """How many different value heads there are."""
        return self.values.out_features // self.whole

    def kept(self, matrix: Matrix, size: int) -> tuple[int, int]:
        """Rows and columns of one of the two that are left with heads of ``size`` dimensions; 0 is all."""
        if size == self.whole:
            return 0, 0
        return (self.groups * size, 0) if matrix is self.values else (0, self.heads * size)

    def smaller(self, moments: Mapping[str, Tensor], gradients: Callable[[str], Tensor]) -> list[Smaller]:
        """Their curves with smaller heads, from second moments of inputs and gradients by name."""
        values, outputs = (
            Known(solvable_weight(matrix.module), moments[matrix.name], gradients(matrix.name))
            for matrix in (self.values, self.outputs)
        )
        found = shrunken_heads(values, outputs, self.heads)
        return [Smaller(each.basis.size, (each.values, each.outputs), each.basis) for each in found]


@dataclass(frozen=True, eq=False)
class Turn:
    """A change of a dimension that several matrices share, as one of them meets it.

    Attributes:
        basis: New basis of value heads, or the hidden units that stay.
        of_values: Whether the dimension is the matrix's outputs, as of values and expanding matrices, or its inputs.
    """

    basis: Change
    of_values: bool

    def weight(self, matrix: Matrix) -> Tensor:
        """The dense matrix in the new basis, in fp32 at least."""
        weight = solvable_weight(matrix.module)
        turned = (self.basis.rows if self.of_values else self.basis.columns)(weight.double())
        return turned.to(torch.promote_types(weight.dtype, torch.float32))

    def statistics(self, matrix: Matrix, known: Statistics) -> Statistics:
        """Those of the matrix in the new basis.

        The inputs of ``outputs`` are in it already, and so is the target that was found with them.
        """
        if not self.of_values:
            return known if known.target is not None else replace(known, target=self.weight(matrix))
        basis, target = self.basis, self.weight(matrix) if known.target is None else self.basis.rows(known.target)
        moment = None if known.gradient_moment is None else basis.gradient_moment(known.gradient_moment)
        means = known.means
        if matrix.bias is not None:
            bias = solvable(matrix.bias.detach()).double()
            given, wanted = means or Means(bias.new_zeros(matrix.in_features), torch.zeros_like(bias))
            means = Means(given, basis.rows(wanted + bias) - bias)  # what is added to the bias turns it as well
        return replace(known, target=target, gradient_moment=moment, means=means)


def value_heads(stream: BlockStream, index: int, matrices: Mapping[str, Matrix]) -> ValueHeads | None:
    """The value heads of block ``index``, if values and outputs are two linear layers among ``matrices``.

    No names are looked at: they are the two between which a change of basis cancels.

    Args:
        stream: At the entrance of the block.
    """
    heads = getattr(stream.model.config.get_text_config(), "num_attention_heads", None)
    attention = [matrix for matrix in reversed(list(matrices.values())) if matrix.group == "attention"]
    if not isinstance(heads, int) or heads < 1:
        return None
    for pair in _candidates(attention, heads):
        if _cancels(lambda: stream.run(index, slice(0, 1)), [pair]):
            return pair
    return None


def free(model: PreTrainedModel, window: Tensor, pairs: Sequence[ValueHeads]) -> list[ValueHeads]:
    """Those in another basis of which the whole model gives the same logits.

    Later blocks may read the values of an earlier one, which that one's own output does not show.

    Args:
        window: Tokens, shape (1, length).
    """

    def logits() -> Tensor:
        return model(window.to(model.device), use_cache=False).logits  # type: ignore[no-any-return]

    if not pairs or _cancels(logits, pairs):
        return list(pairs)
    return [pair for pair in pairs if _cancels(logits, [pair])]


def _candidates(attention: list[Matrix], heads: int) -> Iterator[ValueHeads]:
    for outputs in attention:
        if outputs.in_features % heads:
            continue
        whole = outputs.in_features // heads
        for values in attention:
            groups, rest = divmod(values.out_features, whole)
            if values is not outputs and not rest and groups and heads % groups == 0 and whole > 1:
                yield ValueHeads(values, outputs, heads)


def _cancels(run: Callable[[], Tensor], pairs: Sequence[ValueHeads]) -> bool:
    """Whether a random basis of every value head, taken back before the outputs, leaves what ``run`` returns alone."""
    with torch.no_grad(), ExitStack() as hooks:
        before = run().float()
        back = []
        for seed, pair in enumerate(pairs):
            turn, inverse = _random_basis(pair, seed)
            back.append((pair.outputs.module, inverse))
            hooks.callback(pair.values.module.register_forward_hook(partial(_turn_output, turn)).remove)
        alone = run().float() - before
        for module, inverse in back:
            hooks.callback(module.register_forward_pre_hook(partial(_turn_input, inverse), with_kwargs=True).remove)
        both = run().float() - before
    exact = all(pair.outputs.parameter.dtype in (torch.float32, torch.float64) for pair in pairs)
    return bool(both.norm() < (_EXACT if exact else _ROUNDED) * alone.norm())


def _random_basis(pair: ValueHeads, seed: int) -> tuple[Tensor, Tensor]:
    """Of every value head, and its inverse for every head of the outputs; (heads, whole, whole)."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(pair.groups, pair.whole, pair.whole, generator=generator)).Q
    # As different from head to head as within one, so that no norm of values or outputs hides them.
    scales = 10 ** (2 * torch.rand(pair.groups, pair.whole, 1, generator=generator) - 1)
    inverse = (basis.mT / scales.mT).repeat_interleave(pair.heads // pair.groups, 0)
    return scales * basis, inverse


def _turn_output(turn: Tensor, _: nn.Module, __: Any, output: Tensor) -> Tensor:
    return _by_head(output, turn)


def _turn_input(turn: Tensor, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return (_by_head(input_of(args, kwargs), turn),), {}


def _by_head(x: Tensor, turns: Tensor) -> Tensor:
    """Every head of ``x`` (…, heads · whole) times its matrix of ``turns`` (heads, whole, whole)."""
    parts = x.reshape(*x.shape[:-1], *turns.shape[:2])
    return torch.einsum("...hx,hyx->...hy", parts, turns.to(x)).reshape(x.shape)
