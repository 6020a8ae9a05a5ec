"""Single blocks of a model, run as the model itself calls them.

The model's own forward pass is run on the tokens, but each block before the wanted one gives back at once what it is
known to put out. So masks, positions, embeddings by layer and whatever else an architecture makes of the tokens are
those of the very windows at hand, and none of them has to be kept. Kept is what blocks hand on: the hidden states,
other outputs that the next block is given (router states, chosen keys), and what they write into mappings that all of
them are given (shared keys and values).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten
from transformers import PreTrainedModel

from tensorfold.errors import InputError, pass_on_memory
from tensorfold.utils.finite import why_not_finite

_EXACT, _ROUNDED = 1e-4, 2e-2  # relative differences of one sum in another order, in fp32 and in less


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The tensor that a layer is applied to, given by position or by keyword."""
    return args[0] if args else next(iter(kwargs.values()), None)


def output_of(output: Any) -> Tensor:
    """The first tensor that a module returns: by itself, or in a tuple, a list or a ``ModelOutput``."""
    found = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
    if found is None:
        raise InputError(f"a module returns {type(output).__name__} without a tensor in it; it cannot be calibrated.")
    return found


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module computes ``forward``; its hooks stay, and so does a forward that was put on the instance."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = own


@dataclass(frozen=True)
class Passed:
    """What blocks hand on of one window or several.

    Attributes:
        hidden: Hidden states, shape (windows, ...).
        others: By index among the leaves of the last block's output, what the next block is given of it.
        shared: By argument (position or name) and key, what the blocks so far wrote into mappings.
    """

    hidden: Tensor
    others: dict[int, Tensor] = field(default_factory=dict)
    shared: dict[tuple[int | str, Any], Any] = field(default_factory=dict)

    @classmethod
    def together(cls, hidden: Tensor, parts: Sequence[Passed]) -> Passed:
        """Several windows as one batch; ``hidden`` has the hidden states of all of them."""
        if len(parts) == 1:
            return cls(hidden, parts[0].others, parts[0].shared)
        others = {leaf: torch.cat([part.others[leaf] for part in parts]) for leaf in parts[0].others}
        shared = {
            key: tree_map(lambda *each: torch.cat(each), value, *(part.shared[key] for part in parts[1:]))
            for key, value in parts[0].shared.items()
        }
        return cls(hidden, others, shared)


@dataclass
class _Form:
    """What a block's output looks like: its leaves, with zeros that take no memory for tensors."""

    spec: TreeSpec
    leaves: list[Any]
    main: int
    carried: tuple[int, ...] = ()

    def filled(self, hidden: Tensor, others: dict[int, Tensor]) -> Any:
        leaves = list(self.leaves)
        leaves[self.main] = hidden.to(leaves[self.main].dtype)
        for index, leaf in others.items():
            leaves[index] = leaf
        return tree_unflatten(leaves, self.spec)


class BlockChain:
    """The blocks of a model, each of which is given what the one before it puts out.

    Blocks that text alone does not go through, such as those of cross-attention to images, hand on what they are given.

    Args:
        model: In evaluation mode for as long as this is used.
        window: Tokens that it is looked at with, shape (1, length).

    Attributes:
        shape, dtype: Those of the hidden states of one window; the dtype holds those of every block.

    Raises:
        InputError: The blocks are no chain, or put out NaN or infinity.
    """

    def __init__(self, model: PreTrainedModel, name: str, blocks: nn.ModuleList, window: Tensor) -> None:
        self.model, self.name, self.blocks = model, name, blocks
        self._forms: dict[int, _Form] = {}  # by block, without those that are not called
        self._axis = 0
        self.whole(window)
        shapes = {form.leaves[form.main].shape for form in self._forms.values()}
        if len(shapes) > 1:
            raise self._unfit(
                f"their outputs have different shapes, such as {' and '.join(map(str, map(tuple, shapes)))}"
            )
        [shape] = shapes
        self._axis = next((axis for axis, size in enumerate(shape) if size == 1), 0)
        self.shape = (*shape[: self._axis], *shape[self._axis + 1 :])
        self.dtype = self._forms[0].leaves[self._forms[0].main].dtype
        for form in self._forms.values():
            self.dtype = torch.promote_types(self.dtype, form.leaves[form.main].dtype)

    def whole(self, windows: Tensor) -> Tensor:
        """Output of the last block in a pass through the whole model, and note what every block puts out.

        Raises:
            InputError: As the class; the message names a block whose output is not finite.
        """
        forms: dict[int, _Form] = {}
        place = {id(block): index for index, block in enumerate(self.blocks)}
        left: list[Any] = []  # leaves of the last output, which must live for as long as their identity matters

        def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if forms and place[id(block)] <= max(forms):
                raise self._unfit("they run in another order, or more than once")
            if forms:
                given = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
                last = forms[max(forms)]
                main = last.main
                last.carried = tuple(k for k, leaf in enumerate(left) if k != main and id(leaf) in given)

        def leave(block: nn.Module, _: Any, output: Any) -> None:
            index = place[id(block)]
            left[:], spec = tree_flatten(output)
            main = next((k for k, leaf in enumerate(left) if isinstance(leaf, Tensor)), None)
            if main is None:
                raise self._unfit(f"they return {type(output).__name__} without a tensor")
            check_finite(left[main], f"{self.name}.{index}", self.model)
            forms[index] = _Form(spec, [_zeros(leaf) for leaf in left], main)

        def stop(*_: Any) -> None:
            raise _StopForward

        with ExitStack() as hooks:
            for block in self.blocks:
                hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
                hooks.callback(block.register_forward_hook(leave).remove)
            # Not behind the last block, since some models go through their blocks again; logits are large.
            if (head := self.model.get_output_embeddings()) is not None:
                hooks.callback(head.register_forward_pre_hook(stop).remove)
            self._until_stop(windows)
        if 0 not in forms or len(place) < len(self.blocks):
            raise self._unfit(f"it calls {len(forms)} of the {len(self.blocks)}")
        self._forms = forms
        hidden: Tensor = left[forms[max(forms)].main]
        return hidden.movedim(self._axis, 0)

    def calls(self, index: int) -> bool:
        """Whether text goes through block ``index``."""
        return index in self._forms

    def run(self, index: int, windows: Tensor, before: Passed | None) -> Passed:
        """Run block ``index`` alone; ``before`` is what the one in front of it handed on, None for the first."""
        if before is not None and not self.calls(index):
            return before
        held: dict[tuple[int | str, Any], Any] = {}
        found: list[Passed] = []

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            held.update(_entries(args, kwargs))

        def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            leaves, form = tree_leaves(output), self._forms[index]
            written = {key: value for key, value in _entries(args, kwargs).items() if held.get(key) is not value}
            others = {leaf: leaves[leaf] for leaf in form.carried}
            shared = {**(before.shared if before else {}), **written}
            found.append(Passed(leaves[form.main].movedim(self._axis, 0), others, shared))
            raise _StopForward

        with ExitStack() as hooks:
            if before is not None:
                hidden = before.hidden.movedim(0, self._axis)
                nothing = torch.zeros_like(hidden)
                *early, last = (k for k in self._forms if k < index)
                for k in early:
                    hooks.enter_context(forward_replaced(self.blocks[k], self._known(k, Passed(nothing))))
                known = self._known(last, Passed(hidden, before.others, before.shared))
                hooks.enter_context(forward_replaced(self.blocks[last], known))
            hooks.callback(self.blocks[index].register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(self.blocks[index].register_forward_hook(leave, with_kwargs=True).remove)
            with suppress(_StopForward):
                self.model(windows, use_cache=False)
        return found[0]

    def check(self, windows: Tensor) -> None:
        """Raise :class:`InputError` unless block by block the windows, as one batch, come to what the model makes.

        ``windows`` should not be what the chain was looked at with, so that nothing of those can be mistaken.
        """
        passed: Passed | None = None
        try:
            for index in range(len(self.blocks)):
                passed = self.run(index, windows, passed)
        except InputError:
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            pass_on_memory(error)
            raise self._unfit(
                f"one alone fails with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            ) from error
        whole = self.whole(windows).float()
        assert passed is not None
        exact = self.dtype in (torch.float32, torch.float64)
        if not (passed.hidden.float() - whole).norm() <= (_EXACT if exact else _ROUNDED) * whole.norm():
            raise self._unfit("what a block is given depends on more than the one before it")

    def _known(self, index: int, passed: Passed) -> Callable[..., Any]:
        """A forward of block ``index`` that computes nothing."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            for (argument, key), value in passed.shared.items():
                (args[argument] if isinstance(argument, int) else kwargs[argument])[key] = value
            return self._forms[index].filled(passed.hidden, passed.others)

        return forward

    def _until_stop(self, windows: Tensor) -> None:
        try:
            with suppress(_StopForward):
                self.model(windows, use_cache=False)
        # Positions are counted in many ways, and some architectures have fewer than their configuration says.
        except (IndexError, RuntimeError) as error:
            pass_on_memory(error)
            raise InputError(
                f"calibration: {type(self.model).__name__} does not run on {windows.shape[-1]} tokens at a time "
                f"({' '.join(str(error).split())[:200]}); give fewer with --tokens, or fold it without text."
            ) from error

    def _unfit(self, why: str) -> InputError:
        return InputError(
            f"{type(self.model).__name__} does not run its blocks {self.name!r} one after another ({why}), so it "
            "cannot be calibrated block by block; fold it without calibration text."
        )


def check_finite(hidden: Tensor, block: str, model: nn.Module) -> None:
    if not torch.isfinite(hidden).all():
        raise InputError(f"{block}: its output on the text holds NaN or infinity; {why_not_finite(model)}.")


class _StopForward(Exception):  # noqa: N818  (a signal, not an error)
    """Ends a forward pass once what was wanted of it is there."""


def _zeros(leaf: Any) -> Any:
    return leaf.new_zeros(()).expand(leaf.shape) if isinstance(leaf, Tensor) else leaf


def _entries(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[tuple[int | str, Any], Any]:
    """What the mappings among a call's arguments hold, by argument and key."""
    arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    mappings = [(name, value) for name, value in arguments if isinstance(value, MutableMapping)]
    return {(name, key): value for name, mapping in mappings for key, value in mapping.items()}
