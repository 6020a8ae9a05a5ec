"""One transformer block at a time, run inside the model's own forward pass.

To run block i on a batch of windows, the whole model is called on their token ids with two changes: the blocks before i
return outputs stored earlier instead of computing them, and the pass ends behind block i. The model itself thus makes
masks, positions, embeddings by layer and whatever else its architecture derives from the tokens, for exactly these
windows, and none of that has to be stored. Stored is what one block hands to the next: its hidden states, its other
outputs that the next block takes (router states, selected keys), and the entries that blocks write into mappings which
all of them are given (shared keys and values).
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

# Relative differences that another order of summation may make, in fp32 or wider, and in narrower dtypes.
_EXACT, _ROUNDED = 1e-4, 2e-2


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The tensor that a layer is applied to, given by position or by keyword."""
    return args[0] if args else next(iter(kwargs.values()), None)


def output_of(output: Any) -> Tensor:
    """The first tensor that a module returns: by itself, or in a tuple, a list or a ``ModelOutput``.

    Raises:
        InputError: There is no tensor in it.
    """
    found = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
    if found is None:
        raise InputError(f"a module returns {type(output).__name__} without a tensor in it; it cannot be calibrated.")
    return found


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute ``forward`` while the context is open; its hooks go on running.

    At the end the module's own forward is back, also one that somebody had put on the instance.
    """
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
    """The data that one block hands to the next, for one window or several.

    Attributes:
        hidden: Hidden states, shape (windows, ...), most often (windows, length, width).
        others: Tensors beside the hidden states that the next block takes, by their index among the leaves of the
            block's output.
        shared: Entries that the blocks so far wrote into mappings among their arguments, by argument (position or
            name) and key.
    """

    hidden: Tensor
    others: dict[int, Tensor] = field(default_factory=dict)
    shared: dict[tuple[int | str, Any], Any] = field(default_factory=dict)

    @classmethod
    def together(cls, hidden: Tensor, parts: Sequence[Passed]) -> Passed:
        """One batch of several windows.

        Args:
            hidden: Hidden states of all of them, shape (windows, ...).
            parts: One entry a window; its ``hidden`` is not used.
        """
        if len(parts) == 1:
            return cls(hidden, parts[0].others, parts[0].shared)
        others = {leaf: torch.cat([part.others[leaf] for part in parts]) for leaf in parts[0].others}
        shared = {
            key: tree_map(lambda *each: torch.cat(each), value, *(part.shared[key] for part in parts[1:]))
            for key, value in parts[0].shared.items()
        }
        return cls(hidden, others, shared)

    def beside_hidden(self, autocast: bool) -> Passed:
        """All but the hidden states, with bfloat16 as float32 where autocast made it of a float32 model's tensors.

        A block that is run without autocast later would not bear the one beside the other.
        """

        def restored(value: Any) -> Any:
            return value.float() if autocast and isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value

        return Passed(self.hidden.new_empty(0), tree_map(restored, self.others), tree_map(restored, self.shared))


@dataclass
class _Form:
    """The structure of a block's output.

    Attributes:
        spec: Nesting of the leaves in tuples, lists and mappings.
        leaves: Zeros that take no memory in the place of tensors; other leaves as they were.
        main: Index of the leaf with the hidden states.
        carried: Indices of the other leaves that the next block takes.
    """

    spec: TreeSpec
    leaves: list[Any]
    main: int
    carried: tuple[int, ...] = ()

    def filled(self, hidden: Tensor, others: dict[int, Tensor]) -> Any:
        """An output of this structure with the given hidden states and other leaves, and zeros for the rest."""
        leaves = list(self.leaves)
        leaves[self.main] = hidden.to(leaves[self.main].dtype)
        for index, leaf in others.items():
            leaves[index] = leaf
        return tree_unflatten(leaves, self.spec)


class BlockChain:
    """The blocks of a model as a chain: each one's input is the output of the one before it.

    Blocks that text alone does not go through, such as cross-attention to images, hand on what they are given.

    Args:
        model: In evaluation mode for as long as the chain is used.
        name: Path of the list of blocks in the model, for messages.
        blocks: The blocks, in the order in which the model calls them.
        window: Token ids, shape (1, length), of the pass in which the structure of every output is recorded.

    Attributes:
        shape: Shape of the hidden states of one window, the same behind every block.
        dtype: Dtype that holds the hidden states of every block.

    Raises:
        InputError: The blocks are no chain, or an output holds NaN or infinity.
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
        """Run the model up to its head, and record the structure of every block's output.

        Args:
            windows: Token ids, shape (windows, length).

        Returns:
            Hidden states behind the last block, shape (windows, ...).

        Raises:
            InputError: The blocks are no chain, or an output holds NaN or infinity; the message names its block.
        """
        forms: dict[int, _Form] = {}
        place = {id(block): index for index, block in enumerate(self.blocks)}
        left: list[Any] = []  # leaves of the latest output; kept alive, since they are compared by identity

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
            # Logits are large, so the pass ends at the head; not behind the last block, since some models go through
            # their blocks more than once.
            if (head := self.model.get_output_embeddings()) is not None:
                hooks.callback(head.register_forward_pre_hook(stop).remove)
            self._until_stop(windows)
        if 0 not in forms or len(place) < len(self.blocks):
            raise self._unfit(f"it calls {len(forms)} of its {len(self.blocks)} blocks")
        self._forms = forms
        hidden: Tensor = left[forms[max(forms)].main]
        return hidden.movedim(self._axis, 0)

    def calls(self, index: int) -> bool:
        """Whether text goes through block ``index``."""
        return index in self._forms

    def run(self, index: int, windows: Tensor, before: Passed | None) -> Passed:
        """Run one block and no other.

        Args:
            index: The block's index in the chain.
            windows: Token ids, shape (windows, length).
            before: What the block in front of it handed on for these windows; None for the first block.

        Returns:
            What the block hands on; ``before`` itself where text does not go through the block.
        """
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
                hooks.enter_context(self.known_before(index, before))
            hooks.callback(self.blocks[index].register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(self.blocks[index].register_forward_hook(leave, with_kwargs=True).remove)
            with suppress(_StopForward):
                self.model(windows, use_cache=False)
        return found[0]

    @contextmanager
    def known_before(self, index: int, before: Passed) -> Iterator[None]:
        """Let no block before ``index`` compute anything while the context is open: together they return ``before``.

        With the number of blocks as index, only what lies behind them is left to compute: the last norm and the head.
        """
        hidden = before.hidden.movedim(0, self._axis)
        nothing = torch.zeros_like(hidden)
        *early, last = (k for k in self._forms if k < index)
        with ExitStack() as hooks:
            for k in early:
                hooks.enter_context(forward_replaced(self.blocks[k], self._known(k, Passed(nothing))))
            known = self._known(last, Passed(hidden, before.others, before.shared))
            hooks.enter_context(forward_replaced(self.blocks[last], known))
            yield

    def check(self, windows: Tensor) -> None:
        """Compare the hidden states of blocks that are run one by one with those of the whole model.

        Args:
            windows: Token ids, shape (windows, length), run as one batch. They should differ from the window that the
                chain was made with, so that a value left over from that one shows.

        Raises:
            InputError: The two differ by more than rounding, or a block cannot be run by itself.
        """
        forms = self._forms
        whole = self.whole(windows).float()
        passed: Passed | None = None
        try:
            for index in range(len(self.blocks)):
                passed = self.run(index, windows, passed)
        except InputError:
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            pass_on_memory(error)
            raise self._unfit(
                f"a block that is run by itself fails with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            ) from error
        self._forms = forms  # for windows of the full length
        assert passed is not None
        exact = self.dtype in (torch.float32, torch.float64)
        if not (passed.hidden.float() - whole).norm() <= (_EXACT if exact else _ROUNDED) * whole.norm():
            raise self._unfit("the input of a block depends on more than the block before it")

    def _known(self, index: int, passed: Passed) -> Callable[..., Any]:
        """A forward of block ``index`` that computes nothing and returns stored outputs in the block's structure."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            for (argument, key), value in passed.shared.items():
                (args[argument] if isinstance(argument, int) else kwargs[argument])[key] = value
            return self._forms[index].filled(passed.hidden, passed.others)

        return forward

    def _until_stop(self, windows: Tensor) -> None:
        """Call the model until a hook raises :class:`_StopForward`, or to its end."""
        try:
            with suppress(_StopForward):
                self.model(windows, use_cache=False)
        # Some architectures have room for fewer positions than their configuration says.
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
    """Raise :class:`InputError`, naming the block and the cause, where its hidden states hold NaN or infinity."""
    if not torch.isfinite(hidden).all():
        raise InputError(f"{block}: its output on the text holds NaN or infinity; {why_not_finite(model)}.")


class _StopForward(Exception):  # noqa: N818  (a signal, not an error)
    """The end of a forward pass whose wanted output is there."""


def _zeros(leaf: Any) -> Any:
    """Zeros of a tensor's shape and dtype that share one number of memory; anything else as it is."""
    return leaf.new_zeros(()).expand(leaf.shape) if isinstance(leaf, Tensor) else leaf


def _entries(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[tuple[int | str, Any], Any]:
    """The entries of all mappings among a call's arguments, by argument (position or name) and key."""
    arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    mappings = [(name, value) for name, value in arguments if isinstance(value, MutableMapping)]
    return {(name, key): value for name, mapping in mappings for key, value in mapping.items()}
