"""Gradient moments of one block after another, from the last to the first, with no more than one block at work.

The hidden states that enter every block are computed once, from the first block to the last, and kept; then each block
is computed again from the states that enter it, and its gradients are taken back to these. The sums are those of one
backward pass through the whole model (:func:`~.gradients.gradient_moments`), to the last bit; what differs is that
every block's weights are needed twice in all, not twice for every piece of the text, and that the moments of one block
are finished before those of the next begin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from tensorfold.calibration.block_calls import BlockChain, Passed
from tensorfold.calibration.block_stream import Allocate
from tensorfold.calibration.gradients import averaged, gradient_at, gradients_watched, next_token_logits, pieces_of
from tensorfold.calibration.packed_symmetric import Packed
from tensorfold.data.tokens import check_ids
from tensorfold.models.anatomy import blocks
from tensorfold.utils.activation_store import let_go


def walk_gradient_moments(
    model: PreTrainedModel,
    windows: Tensor,
    modules: Mapping[str, nn.Module],
    prefix: int,
    rounded: bool,
    allocate: Allocate,
    keep: Callable[[dict[str, Packed]], None],
) -> None:
    """The moments that ``gradient_moments(…, drawn=True)`` gives, of modules inside the blocks, block by block.

    Args:
        model: In evaluation mode.
        windows: Token ids, shape (windows, length).
        modules: Modules inside the blocks, by name.
        prefix, rounded: As for :func:`~.gradients.gradient_moments`.
        allocate: Makes the tensors for the states between blocks, all of them together of shape
            (blocks + 1, tokens, width).
        keep: Given the moments of each block by name, the last block first.

    Raises:
        InputError: The blocks are no chain, or gradients are not finite.
        RuntimeError: The model's code does not bear products in bfloat16 (``rounded``).
    """
    name, chain = blocks(model)
    check_ids(model, windows, "calibration")
    pieces = pieces_of(model, windows, prefix)
    sums: dict[str, Packed] = {}
    with gradients_watched(model, modules, sums, rounded):
        walk = _Walk(model, name, chain, pieces, allocate)
        for index in range(len(chain)):
            walk.forward(index)
        walk.through_head(prefix)
        for index in reversed(range(len(chain))):
            walk.backward(index)
            averaged(sums, pieces, model)
            keep(dict(sums))
            sums.clear()


@dataclass
class _Border:
    """What enters one block besides hidden states, by piece, and the gradients there.

    Attributes:
        hidden: Hidden states of the pieces of every length, shape (pieces, length, width).
        rest: Others and shared tensors of every piece, without hidden states.
    """

    hidden: dict[int, Tensor]
    rest: dict[int, Passed] = field(default_factory=dict)


class _Walk:
    """States at the borders of blocks, and gradients at the one that the walk has come to.

    Args:
        pieces: Token ids, each of shape (length,); few lengths differ.
        allocate: Makes the tensors for hidden states.
    """

    def __init__(
        self, model: PreTrainedModel, name: str, chain: nn.ModuleList, pieces: list[Tensor], allocate: Allocate
    ) -> None:
        self.model, self.pieces, self.count, self.allocate = model, pieces, len(chain), allocate
        first: dict[int, Tensor] = {}
        self.rows: list[int] = []  # of a piece among those of its length
        many: dict[int, int] = {}
        for piece in pieces:
            first.setdefault(len(piece), piece)
            self.rows.append(many.get(len(piece), 0))
            many[len(piece)] = self.rows[-1] + 1
        with torch.no_grad():
            self.chains = {length: BlockChain(model, name, chain, piece[None]) for length, piece in first.items()}

        def states() -> dict[int, Tensor]:
            return {length: allocate((many[length], *each.shape), each.dtype) for length, each in self.chains.items()}

        self.borders = [_Border({}), *(_Border(states()) for _ in range(self.count))]
        self.gradients = _Border(states())  # at the border that the walk has come to

    def forward(self, index: int) -> None:
        """Compute what leaves block ``index``, for all pieces, in the mode in which it is computed again."""
        behind = self.borders[index + 1]
        for k, piece in enumerate(self.pieces):
            before, _ = self._entering(index, k)
            after = self.chains[len(piece)].run(index, piece[None], before)
            behind.hidden[len(piece)][self.rows[k]] = after.hidden[0].detach()
            behind.rest[k] = _detached(after)
        self._let_go(index)

    def through_head(self, prefix: int) -> None:
        """Take the loss's gradients back to what leaves the last block."""
        for k, piece in enumerate(self.pieces):
            before, leaves = self._entering(self.count, k)
            assert before is not None
            with self.chains[len(piece)].known_before(self.count, before):
                logits = next_token_logits(self.model, piece[None])
            logits.backward(gradient_at(logits, piece, prefix, drawn=True))  # type: ignore[no-untyped-call]
            self._hand_on(k, leaves)
        self._let_go(self.count)

    def backward(self, index: int) -> None:
        """Take the gradients of all pieces from behind block ``index`` to what enters it."""
        for k, piece in enumerate(self.pieces):
            before, leaves = self._entering(index, k)
            after = self.chains[len(piece)].run(index, piece[None], before)
            known = self.gradients.rest[k]
            hidden = self.gradients.hidden[len(piece)][self.rows[k]][None]
            pairs = [(after.hidden, hidden), *_paired(after.others, known.others), *_paired(after.shared, known.shared)]
            outputs = [(tensor, gradient) for tensor, gradient in pairs if tensor.requires_grad]
            torch.autograd.backward([tensor for tensor, _ in outputs], [gradient for _, gradient in outputs])
            if leaves is not None:
                self._hand_on(k, leaves)
        self._let_go(index)

    def _entering(self, index: int, k: int) -> tuple[Passed | None, Passed | None]:
        """What piece ``k`` enters block ``index`` with, and the leaves that it is made of; nothing before the first."""
        if not index:
            return None, None
        border, piece = self.borders[index], self.pieces[k]
        rest = border.rest[k]
        leaves = Passed(
            border.hidden[len(piece)][self.rows[k]][None].clone().requires_grad_(),
            tree_map(_leaf, rest.others),
            tree_map(_leaf, rest.shared),
        )
        # No leaves: some blocks write into what they are given.
        return Passed(leaves.hidden.clone(), tree_map(_own, leaves.others), tree_map(_own, leaves.shared)), leaves

    def _let_go(self, index: int) -> None:
        """Take the states at the entrance of block ``index`` out of memory, and the gradients, where they are files."""
        for states in (self.borders[index], self.gradients):
            for tensor in states.hidden.values():
                let_go(self.allocate, tensor)

    def _hand_on(self, k: int, leaves: Passed | None) -> None:
        assert leaves is not None
        gradient = leaves.hidden.grad
        assert gradient is not None
        self.gradients.hidden[len(self.pieces[k])][self.rows[k]] = gradient[0]
        self.gradients.rest[k] = Passed(
            gradient.new_empty(0), tree_map(_gradient, leaves.others), tree_map(_gradient, leaves.shared)
        )


def _detached(passed: Passed) -> Passed:
    def detach(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else value

    return Passed(passed.hidden.new_empty(0), tree_map(detach, passed.others), tree_map(detach, passed.shared))


def _leaf(value: Any) -> Any:
    return value.clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _gradient(value: Any) -> Tensor | None:
    return value.grad if isinstance(value, Tensor) else None


def _paired(values: Mapping[Any, Any], gradients: Mapping[Any, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Tensors of a mapping with the gradients that later blocks gave them; those that no block read have none."""
    for key, value in values.items():
        leaves = tree_leaves(value)
        known = tree_leaves(gradients[key], is_leaf=lambda leaf: leaf is None) if key in gradients else []
        for leaf, gradient in zip(leaves, known, strict=False):
            if isinstance(leaf, Tensor) and gradient is not None:
                yield leaf, gradient
