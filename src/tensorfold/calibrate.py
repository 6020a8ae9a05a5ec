"""Calibration: text in, second moments of layer inputs out, one transformer block at a time.

The hidden states of all calibration windows are carried from block to block, so each block is measured on the output
of the blocks already folded before it, and no activation of any other block is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tensorfold.anatomy import blocks
from tensorfold.errors import InputError, pass_on_memory
from tensorfold.finite import why_not_finite
from tensorfold.tokens import Encoder, begin, check_ids

WINDOW = 1024

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], tokens: int, limit: int | None = None
) -> Tensor:
    """Equal windows of at most ``limit`` tokens that together hold ``tokens`` of them; shape (windows, length).

    Documents are joined by blank lines. Every window begins with what the tokenizer puts before a document, which is
    among its tokens. Windows are equal so that one attention mask serves all.

    Raises:
        InputError: The text is too short.
    """
    length = min(WINDOW, limit or WINDOW)
    encoder = Encoder(tokenizer)
    opening = len(encoder.prefix)
    if tokens < max(2, opening + 1):
        raise InputError(f"calibration: tokens={tokens}; needed at least {max(2, opening + 1)}.")
    if length <= opening:
        raise InputError(
            f"calibration: windows of {length} tokens, and the tokenizer puts {opening} before every document; needed "
            "a model with a longer context."
        )
    ids = encoder.first("\n\n".join(documents), tokens)
    if len(ids) < min(tokens, length):
        raise InputError(
            f"calibration: the text has {len(ids)} tokens; needed at least {min(tokens, length)}. Give a longer text."
        )
    tokens = min(tokens, len(ids))
    count = min(-(-tokens // length), tokens // (opening + 1))
    each = min(tokens // count, length) - opening
    return begin(encoder.prefix, torch.tensor(ids[opening:])[: count * each].reshape(count, each))


def token_counts(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], vocabulary: int) -> Tensor:
    """How often the text uses each token; int64, shape (vocabulary,).

    Special tokens count as often as the most frequent one: chats and documents are built of them, and text has none.

    Raises:
        InputError: The tokenizer gives a token that the vocabulary lacks.
    """
    counts = torch.zeros(vocabulary, dtype=torch.int64)
    encoder = Encoder(tokenizer)
    for document in documents:
        ids = torch.tensor(encoder(document), dtype=torch.int64)
        check_ids(vocabulary, ids, "calibration", tokenizer)
        counts += ids.bincount(minlength=vocabulary)
    special = [index for index in tokenizer.all_special_ids if index < vocabulary]
    counts[special] = counts.max()
    return counts


class BlockStream:
    """Hidden states of the calibration windows at the entrance of the next transformer block.

    ``hidden`` has the shape (windows, length, width) and is overwritten by every :meth:`advance`; ``position`` is the
    index of the block whose entrance it stands at.

    Args:
        model: In evaluation mode, and without gradients, for as long as the stream is used.
        windows: Token indices, shape (windows, length).
        allocate: Makes the tensor for ``hidden`` from shape and dtype; on the model's device if None.

    Raises:
        InputError: The architecture does not run its blocks as a plain chain.
    """

    def __init__(self, model: PreTrainedModel, windows: Tensor, allocate: Allocate | None = None) -> None:
        self.model = model
        self.name, self.blocks = blocks(model)
        self.device = next(model.get_input_embeddings().parameters()).device
        check_ids(model, windows, "calibration")
        self.windows = windows.to(self.device)
        self.position = 0
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._record_calls()
        first = self._entrance(self.windows[:1])
        shape = (len(windows), *first.shape[1:])
        self.hidden = allocate(shape, first.dtype) if allocate else first.new_empty(shape)
        self.hidden[:1] = first
        for k in range(1, len(windows)):
            self.hidden[k : k + 1] = self._entrance(self.windows[k : k + 1])

    def _record_calls(self) -> None:
        """Run one window through the model, keep what each block is called with, and check that they form a chain."""
        entered: list[Tensor] = []
        left: list[Tensor] = []

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, rest, named = _split_call(args, kwargs)
            entered.append(hidden)
            self._calls.append((rest, named))

        def leave(block: nn.Module, _: Any, output: Any) -> None:
            left.append(_hidden_of(output))
            _check_finite(left[-1], f"{self.name}.{len(left) - 1}", self.model)
            if block is self.blocks[-1]:
                raise _StopForward

        with ExitStack() as hooks:
            for block in self.blocks:
                hooks.enter_context(_removing(block.register_forward_pre_hook(enter, with_kwargs=True)))
                hooks.enter_context(_removing(block.register_forward_hook(leave)))
            self._until_stop(self.windows[:1])
        chain = len(entered) == len(self.blocks) and all(
            torch.equal(out, into) for out, into in zip(left[:-1], entered[1:], strict=True)
        )
        if not chain:
            raise InputError(
                f"{type(self.model).__name__} does not run its blocks {self.name!r} one after another, so it cannot be "
                "calibrated block by block; fold it without calibration text."
            )

    def _entrance(self, window: Tensor) -> Tensor:
        caught: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append(_split_call(args, kwargs)[0])
            raise _StopForward

        with _removing(self.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)):
            self._until_stop(window)
        return caught[0]

    def _until_stop(self, window: Tensor) -> None:
        try:
            with suppress(_StopForward):
                self.model(window, use_cache=False)
        # Positions are counted in many ways, and some architectures have fewer than their configuration says.
        except (IndexError, RuntimeError) as error:
            pass_on_memory(error)
            raise InputError(
                f"calibration: {type(self.model).__name__} does not run on {window.shape[-1]} tokens at a time "
                f"({' '.join(str(error).split())[:200]}); give fewer with --tokens, or fold it without text."
            ) from error

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Output of block ``index`` for the hidden states of one window or several, shape (windows, length, width)."""
        rest, named = self._calls[index]
        return _hidden_of(self.blocks[index](hidden.to(self.device), *rest, **named))

    def moments(self, index: int, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """Second moments of the inputs that block ``index`` gives to ``modules``; see :func:`second_moments`."""

        def forward() -> None:
            for hidden in self.hidden.split(1):
                self.run(index, hidden)

        return second_moments(forward, modules, model=self.model)

    def advance(self, index: int) -> None:
        """Replace the hidden states by the output of block ``index`` as it now is.

        Raises:
            InputError: The block's output is not finite.
        """
        for hidden in self.hidden.split(1):
            hidden.copy_(self.run(index, hidden))
            _check_finite(hidden, f"{self.name}.{index}", self.model)
        self.position = index + 1

    def advance_to(self, index: int) -> None:
        """Carry the hidden states to the entrance of block ``index``, through the blocks before it as they now are."""
        while self.position < index:
            self.advance(self.position)

    def stages(self, index: int, modules: Mapping[str, nn.Module]) -> list[list[str]]:
        """The modules of block ``index`` in the order in which one window meets them, those given the very same tensor
        together; what it does not meet is in the last stage."""
        met: list[tuple[Any, list[str]]] = []

        def hook(name: str) -> Callable[..., None]:
            def record(_: nn.Module, args: tuple[Any, ...]) -> None:
                if any(name in stage for _, stage in met):
                    return
                if met and met[-1][0] is args[0]:
                    met[-1][1].append(name)
                else:
                    met.append((args[0], [name]))

            return record

        with ExitStack() as hooks, torch.no_grad():
            for name, module in modules.items():
                hooks.enter_context(_removing(module.register_forward_pre_hook(hook(name))))
            self.run(index, self.hidden[:1])
        stages = [stage for _, stage in met] or [[]]
        stages[-1] += [name for name in modules if not any(name in stage for stage in stages)]
        return stages

    def outside(self, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """Second moments of the inputs of modules outside the blocks, from whole passes through the model."""

        def forward() -> None:
            for window in self.windows.split(1):
                self.model(window, use_cache=False)

        return second_moments(forward, modules, model=self.model)


def second_moments(
    forward: Callable[[], None],
    modules: Mapping[str, nn.Module],
    all_called: bool = True,
    model: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Run ``forward`` and return, for each module, ``C = Xᵀ X / tokens`` of the inputs X it saw, in fp32.

    Modules that are given the very same tensors (query, key and value; gate and up) share one accumulation and one
    result. Shape of each C: (in_features, in_features).

    Args:
        all_called: Whether a module that is never called is an error; otherwise it has none.
        model: What the modules are part of, to say why their inputs are not finite.

    Raises:
        InputError: A module saw NaN or infinity, or was never called; the message names it.
    """
    sums: dict[frozenset[str], Tensor] = {}  # by the modules that were given the same tensor
    tokens: dict[frozenset[str], int] = {}
    given: list[tuple[Any, Tensor, set[str]]] = []  # a tensor, its vectors, and who has been given it so far

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            if given and given[0][0] is x and name not in given[0][2]:
                given[0][2].add(name)
                return
            add()
            flat = x.detach().reshape(-1, x.shape[-1]).float()
            # A copy, which nothing changes in place before it is known who else is given it.
            given[:] = [(x, flat.clone() if flat.data_ptr() == x.data_ptr() else flat, {name})]

        return hook

    def add() -> None:
        for _, flat, names in given:
            key = frozenset(names)
            if key not in sums:
                sums[key], tokens[key] = torch.zeros(flat.shape[-1], flat.shape[-1], device=flat.device), 0
            sums[key].addmm_(flat.T, flat)
            tokens[key] += flat.shape[0]
        given.clear()

    with ExitStack() as hooks, torch.no_grad():
        for name, module in modules.items():
            hooks.enter_context(_removing(module.register_forward_pre_hook(watch(name))))
        forward()
        add()
    averages: dict[tuple[frozenset[str], ...], Tensor] = {}
    found = {}
    for name in modules:
        keys = tuple(key for key in sums if name in key)
        if not sum(tokens[key] for key in keys):
            if all_called:
                raise InputError(f"{name}: not called on the calibration text, so it has no statistics; exclude it.")
            continue
        if keys not in averages:
            total = sums[keys[0]] if len(keys) == 1 else torch.stack([sums[key] for key in keys]).sum(0)
            averages[keys] = total / sum(tokens[key] for key in keys)
            if not torch.isfinite(averages[keys]).all():
                raise not_finite_inputs(name, model or modules[name])
        found[name] = averages[keys]
    return found


def not_finite_inputs(name: str, model: nn.Module) -> InputError:
    """What to raise for a module whose inputs are not finite."""
    return InputError(f"{name}: its inputs on the calibration text hold NaN or infinity; {why_not_finite(model)}.")


def inputs_of(forward: Callable[[], None], module: nn.Module, model: nn.Module) -> Tensor:
    """Run ``forward`` and return the vectors that ``module`` was applied to, fp32, shape (vectors, in_features).

    Raises:
        InputError: It saw NaN or infinity, or was never called.
    """
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].detach().reshape(-1, args[0].shape[-1]).float())

    with _removing(module.register_forward_pre_hook(hook)), torch.no_grad():
        forward()
    if not seen:
        raise InputError(f"{type(module).__name__}: not called on the calibration text; exclude the table tied to it.")
    if not all(bool(part.isfinite().all()) for part in seen):
        raise not_finite_inputs(type(module).__name__, model)
    return torch.cat(seen)


def _check_finite(hidden: Tensor, block: str, model: nn.Module) -> None:
    if not torch.isfinite(hidden).all():
        raise InputError(f"{block}: its output on the text holds NaN or infinity; {why_not_finite(model)}.")


class _StopForward(Exception):  # noqa: N818  (a signal, not an error)
    """Ends a forward pass once what was wanted of it is there."""


@contextmanager
def _removing(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """A block's hidden states, and the rest of its call."""
    if args:
        return args[0], args[1:], kwargs
    named = dict(kwargs)
    return named.pop("hidden_states"), (), named


def _hidden_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
