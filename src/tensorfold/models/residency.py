"""Which of a model's weights are in memory while it is folded: all, or those of one block.

A checkpoint's weights are mapped from their files: a page of them takes memory from the first time that it is used.
What keeps a model out of memory is therefore only that pages which are no longer used are let go.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor, nn

from tensorfold.models.anatomy import Matrix, blocks
from tensorfold.utils.memory import drop_file_pages, is_file_mapped, release_heap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tensorfold.utils.activation_store import ActivationStore

Named = TypeVar("Named", tuple[str, Tensor], Matrix)


class Residency:
    """All weights stay where they are, and activations are in memory.

    Attributes:
        activations: Where the states between blocks are kept; None for the model's device.
        is_partial: Whether only some of the weights are in memory.
    """

    activations: ActivationStore | None = None
    is_partial = False

    def each(self, weights: Iterable[Named]) -> Iterator[Named]:
        """Every weight in turn; the caller is done with one when it asks for the next."""
        return iter(weights)

    def keep_in_file(self, names: Iterable[str]) -> None:
        """Move parameters, by name in the model, to where they need no memory while they are not used."""


WHOLE = Residency()


class OneBlock(Residency):
    """The weights of one block of a model are in memory, and nothing of the others.

    The block is the one whose layers were called last. Tables and the head are let go with every change of the block.
    Vectors such as norms and biases stay in memory, since steps on them are taken in place.

    Args:
        model: Model whose matrices are mapped from files, and are not written to while this object is open.
        activations: Where the states between blocks are kept.
    """

    is_partial = True

    activations: ActivationStore

    def __init__(self, model: PreTrainedModel, activations: ActivationStore) -> None:
        self.model, self.activations = model, activations
        self._name, self._chain = blocks(model)
        self._current: int | None = None
        # The dense weights, which come back while those that replace them are fitted.
        self._dense = [_mapped(block) for block in self._chain]
        inside = {id(weight) for weights in self._dense for weight in weights}
        self._outside = [weight for weight in _mapped(model) if id(weight) not in inside]
        self._kept: dict[int, Tensor] = {}  # by id of its parameter
        self._kept_outside: list[Tensor] = []
        self._hooks = ExitStack()
        for index, block in enumerate(self._chain):
            for module in block.modules():
                if any(True for _ in module.parameters(recurse=False)):
                    hook = module.register_forward_pre_hook(lambda *_, index=index: self._enter(index))
                    self._hooks.callback(hook.remove)

    def __enter__(self) -> OneBlock:
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()
        self._leave()

    def each(self, weights: Iterable[Named]) -> Iterator[Named]:
        """Every weight in turn, let go when the next is asked for."""
        known = {id(weight) for part in (*self._dense, self._outside) for weight in part}
        for item in weights:
            yield item
            weight = item.parameter if isinstance(item, Matrix) else item[1]
            if id(weight) in known:
                drop_file_pages(weight)

    def keep_in_file(self, names: Iterable[str]) -> None:
        """Move parameters to mapped files, which begin at a page: products of them give the same bits as in memory."""
        parameters = dict(self.model.named_parameters())
        for name in parameters.keys() & set(names):
            own = parameters[name]
            kept = self.activations(tuple(own.shape), own.dtype)
            own.data = kept.copy_(own.detach())
            self._kept[id(own)] = kept
            if not name.startswith(f"{self._name}."):
                self._kept_outside.append(kept)
        release_heap()

    def _enter(self, index: int) -> None:
        if index != self._current:
            self._leave()
            self._current = index

    def _leave(self) -> None:
        """Let go of the block whose layers were called last, and of everything outside the blocks."""
        leaving = [*self._outside, *self._kept_outside]
        if self._current is not None:
            leaving += self._dense[self._current]
            own = self._chain[self._current].parameters()
            leaving += [p for p in own if p.dim() > 1 and _is_still(p, self._kept.get(id(p)))]
        for weight in leaving:
            drop_file_pages(weight)


def _mapped(module: nn.Module) -> list[Tensor]:
    """Matrices among the parameters of a module that are mapped from a file."""
    return [p for p in module.parameters() if p.dim() > 1 and is_file_mapped(p)]


def _is_still(parameter: Tensor, kept: Tensor | None) -> bool:
    """Whether a parameter still is the tensor that it was given from a file."""
    return kept is not None and parameter.data_ptr() == kept.data_ptr()
