"""Second moments of layer inputs on a calibration text, one transformer block at a time.

The hidden states of all calibration windows are carried from block to block, so each block is measured on the output
of the blocks already folded before it, and no activation of any other block is kept.

Notation: n input features of a layer, C its input moment (n × n), X its inputs (tokens × n).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tensorfold.algebra.precision import solvable
from tensorfold.calibration.block_calls import BlockChain, Passed, check_finite, input_of
from tensorfold.data.tokens import check_ids
from tensorfold.errors import InputError
from tensorfold.models.anatomy import blocks
from tensorfold.utils.activation_store import let_go
from tensorfold.utils.finite import why_not_finite
from tensorfold.utils.torch_modes import bears_bfloat16, rounded_products

_CHECKED = 256  # tokens of a window on which blocks run one by one are compared with the whole model

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]


class BlockStream:
    """The hidden states of all calibration windows at the entrance of one transformer block.

    Everything else that a block is given is made by the model itself, for the windows that are run; see
    :mod:`tensorfold.calibration.block_calls`.

    Args:
        model: In evaluation mode, and without gradients, for as long as the stream is used.
        windows: Token ids, shape (windows, length).
        allocate: Makes the tensor for ``hidden`` from shape and dtype; on the model's device if None.
        batch: Most windows that :meth:`run` is given at a time.

    Attributes:
        position: Index of the block at whose entrance the stream stands.
        hidden: Hidden states there, shape (windows, length, width) or what the architecture has in its place; written
            by :meth:`advance`, undefined before the first block.

    Raises:
        InputError: Blocks run one by one do not give the hidden states that the whole model gives for the beginnings
            of the last windows.
    """

    def __init__(
        self, model: PreTrainedModel, windows: Tensor, allocate: Allocate | None = None, batch: int = 1
    ) -> None:
        self.model, self._allocate = model, allocate
        self.name, self.blocks = blocks(model)
        self.device = next(model.get_input_embeddings().parameters()).device
        check_ids(model, windows, "calibration")
        self.windows = windows.to(self.device)
        self.position = 0
        with torch.no_grad():
            self._chain = BlockChain(model, self.name, self.blocks, self.windows[:1])
            self._chain.check(self.windows[-batch:, :_CHECKED])
        shape, dtype = (len(windows), *self._chain.shape), self._chain.dtype
        self.hidden = allocate(shape, dtype) if allocate else torch.empty(shape, dtype=dtype, device=self.device)
        self._passed: list[Passed] = []  # by window, beside the hidden states

    @cached_property
    def _bears_bfloat16(self) -> bool:
        first = self.windows[:1, :_CHECKED]
        return self.device.type == "cpu" and bears_bfloat16(self.model, lambda: self.model(first, use_cache=False))

    @contextmanager
    def rounded(self, wanted: bool = True) -> Iterator[None]:
        """Let passes round for as long as the context is open, for statistics over many tokens.

        Products take bfloat16 inputs where the processor has instructions for it, and also hand on bfloat16 where the
        model's code bears that; see :func:`rounded_products`. Hidden states between blocks stay as they are.

        Args:
            wanted: False leaves everything as it is.
        """
        with rounded_products(wanted), torch.autocast("cpu", torch.bfloat16, wanted and self._bears_bfloat16):
            yield

    @property
    def width(self) -> int:
        """Number of features of the hidden states."""
        return int(self.hidden.shape[-1])

    def calls(self, index: int) -> bool:
        """Whether text goes through block ``index``: not through cross-attention to images, for one."""
        return self._chain.calls(index)

    def run(self, index: int, chosen: Tensor | slice) -> Tensor:
        """Hidden states behind block ``index``, at whose entrance the stream has to stand.

        Args:
            index: The block's index.
            chosen: Indices of the windows to run, as one batch.

        Returns:
            Shape (windows, length, width), with the chosen windows only.
        """
        return self._run(index, torch.arange(len(self.windows))[chosen]).hidden

    def _run(self, index: int, chosen: Tensor) -> Passed:
        before = None
        if index:
            parts = [self._passed[k] for k in chosen.tolist()]
            before = Passed.together(self.hidden[chosen.to(self.hidden.device)].to(self.device), parts)
        return self._chain.run(index, self.windows[chosen.to(self.device)], before)

    def pass_on(self, index: int, k: int) -> Tensor:
        """Replace the hidden states of window ``k`` by those behind block ``index``, and return them.

        Whoever has done so for every window calls :meth:`stand_behind`.

        Returns:
            Shape (1, length, width).
        """
        passed = self._run(index, torch.tensor([k]))
        self.hidden[k : k + 1] = passed.hidden
        rest = passed.beside_hidden(torch.is_autocast_enabled("cpu"))
        self._passed[k:] = [rest] if index == 0 else [rest, *self._passed[k + 1 :]]
        return passed.hidden

    def input_moments(
        self,
        index: int,
        modules: Mapping[str, nn.Module],
        all_called: bool = True,
        tokens: dict[str, int] | None = None,
    ) -> dict[str, Tensor]:
        """Input moments (n × n) of modules in block ``index``, by name; see :func:`input_moments`."""

        def forward() -> None:
            for k in range(len(self.windows)):
                self.run(index, slice(k, k + 1))

        return input_moments(forward, modules, all_called, self.model, tokens)

    def advance(self, index: int) -> None:
        """Carry all hidden states through block ``index`` as it now is.

        Raises:
            InputError: The block's output is not finite.
        """
        for k in range(len(self.windows)):
            check_finite(self.pass_on(index, k), f"{self.name}.{index}", self.model)
        self.stand_behind(index)

    def stand_behind(self, index: int) -> None:
        """Set the position behind block ``index``, once the states of every window are those there."""
        self.position = index + 1
        let_go(self._allocate, self.hidden)

    def advance_to(self, index: int) -> None:
        """Carry the hidden states to the entrance of block ``index``, through the blocks before it as they now are."""
        while self.position < index:
            self.advance(self.position)

    def stages(self, index: int, modules: Mapping[str, nn.Module]) -> list[list[str]]:
        """Names of the modules of block ``index`` in stages, in the order in which a forward pass reaches them.

        Modules that are given the same tensor (query, key and value; gate and up) are one stage. Modules that the first
        window does not reach, such as experts, are in the last stage.
        """
        met: list[tuple[Any, list[str]]] = []

        def hook(name: str) -> Callable[..., None]:
            def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                given = input_of(args, kwargs)
                if any(name in stage for _, stage in met):
                    return
                if met and met[-1][0] is given:
                    met[-1][1].append(name)
                else:
                    met.append((given, [name]))

            return record

        with ExitStack() as hooks, torch.no_grad():
            for name, module in modules.items():
                hooks.callback(module.register_forward_pre_hook(hook(name), with_kwargs=True).remove)
            self.run(index, slice(0, 1))
        stages = [stage for _, stage in met] or [[]]
        stages[-1] += [name for name in modules if not any(name in stage for stage in stages)]
        return stages

    def input_moments_outside(self, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """Input moments (n × n) of modules outside the blocks, by name, from whole passes through the model."""

        def forward() -> None:
            for window in self.windows.split(1):
                self.model(window, use_cache=False)

        return input_moments(forward, modules, model=self.model)


def input_moments(
    forward: Callable[[], None],
    modules: Mapping[str, nn.Module],
    all_called: bool = True,
    model: nn.Module | None = None,
    counts: dict[str, int] | None = None,
) -> dict[str, Tensor]:
    """The input moment ``C = Xᵀ X / tokens`` of every module, X (tokens × n) being all inputs in one run.

    Modules that are given the same tensors (query, key and value; gate and up) share one sum and one result.

    Args:
        forward: Runs what calls the modules.
        modules: Modules to watch, by name.
        all_called: Whether a module that is never called is an error; otherwise it is left out of the result.
        model: The model that the modules are part of, to say why their inputs are not finite.
        counts: Is given the number of vectors that each module was called with, by name.

    Returns:
        By name, fp32, shape (n, n), where it can be decomposed.

    Raises:
        InputError: A module's inputs hold NaN or infinity, or it was never called; the message names it.
    """
    sums: dict[frozenset[str], Tensor] = {}  # by the modules that were given the same tensor
    tokens: dict[frozenset[str], int] = {}
    given: list[tuple[Any, Tensor, set[str]]] = []  # the latest input, its vectors, and the modules given it so far

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = input_of(args, kwargs)
            if given and given[0][0] is x and name not in given[0][2]:
                given[0][2].add(name)
                return
            add()
            flat = x.detach().reshape(-1, x.shape[-1]).float()  # (tokens, n)
            # A copy: the model may write into x before the last module that is given x has been seen.
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
            hooks.callback(module.register_forward_pre_hook(watch(name), with_kwargs=True).remove)
        forward()
        add()
    averages: dict[tuple[frozenset[str], ...], Tensor] = {}
    found = {}
    for name in modules:
        keys = tuple(key for key in sums if name in key)
        if not sum(tokens[key] for key in keys):
            continue
        if keys not in averages:
            total = sums[keys[0]] if len(keys) == 1 else torch.stack([sums[key] for key in keys]).sum(0)
            averages[keys] = solvable(total / sum(tokens[key] for key in keys))
            if not torch.isfinite(averages[keys]).all():
                raise not_finite_inputs(name, model or modules[name])
        found[name] = averages[keys]
        if counts is not None:
            counts[name] = sum(tokens[key] for key in keys)
    if all_called:
        check_called(modules, found)
    return found


def check_called(names: Iterable[str], found: Collection[str]) -> None:
    """Check that all modules of some names were called.

    Raises:
        InputError: One was not; the message names it.
    """
    for name in names:
        if name not in found:
            raise InputError(f"{name}: not called on the calibration text, so it has no statistics; exclude it.")


def not_finite_inputs(name: str, model: nn.Module) -> InputError:
    """The error for a module whose inputs hold NaN or infinity, with the cause that is found in ``model``."""
    return InputError(f"{name}: its inputs on the calibration text hold NaN or infinity; {why_not_finite(model)}.")


def inputs_of(forward: Callable[[], None], module: nn.Module, model: nn.Module) -> Tensor:
    """All input vectors of a module in one run, fp32, shape (tokens, n).

    Args:
        forward: Runs what calls the module.
        module: The module to watch.
        model: The model that it is part of, to say why its inputs are not finite.

    Raises:
        InputError: Its inputs hold NaN or infinity, or it was never called.
    """
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = input_of(args, kwargs)
        seen.append(x.detach().reshape(-1, x.shape[-1]).float())  # (tokens, n)

    with ExitStack() as hooks, torch.no_grad():
        hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        forward()
    if not seen:
        raise InputError(f"{type(module).__name__}: not called on the calibration text; exclude the table tied to it.")
    if not all(bool(part.isfinite().all()) for part in seen):
        raise not_finite_inputs(type(module).__name__, model)
    return torch.cat(seen)
