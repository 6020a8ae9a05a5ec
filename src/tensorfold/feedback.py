"""Error feedback: a block is fitted to what the dense model makes of the text, from what the folded one hands it.

A layer of the folded model is given inputs x̃ that the folds before it have changed. What it should put out is what the
dense layer makes of the dense model's own inputs x, and, where its output is added to the stream that leaves the
block, also what that stream lacks by now, d. The matrix that does this best is a regression,

    W̄ = (W A + D + μ W diag C) (C + μ diag C)⁻¹        A = E[x x̃ᵀ],  C = E[x̃ x̃ᵀ],  D = E[d x̃ᵀ]

with a ridge μ that pulls it towards W; W̄ is then folded in W's place. With a bias all moments are taken about the
means, and the bias makes up for what the means lack. GPTQ-style quantisers do the same column by column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tensorfold.algebra.statistics import Means, Statistics
from tensorfold.anatomy import Matrix, dense_weight
from tensorfold.calibrate import BlockStream
from tensorfold.errors import InputError
from tensorfold.memory import release_file_pages

RIDGE = 0.1  # chosen on held-out windows of a calibration text; see studies/smollm2
_DIRECT = 2e-2  # relative; the states may be bf16


class Reference:
    """The dense model, block by block, beside the one that is being folded.

    Args:
        model: Still dense; its modules in ``chosen`` will be replaced, and are kept here.
    """

    def __init__(self, model: PreTrainedModel, windows: Tensor, chosen: Mapping[str, Matrix]) -> None:
        self.model, self.chosen = model, chosen
        self.stream = BlockStream(model, windows)

    @contextmanager
    def _dense(self, index: int) -> Iterator[None]:
        """Block ``index`` as it was."""
        prefix = f"{self.stream.name}.{index}."
        folded = {}
        for name, matrix in self.chosen.items():
            if name.startswith(prefix) and (module := self.model.get_submodule(name)) is not matrix.module:
                folded[name] = module
        for name in folded:
            self.model.set_submodule(name, self.chosen[name].module)
        try:
            yield
        finally:
            for name, module in folded.items():
                self.model.set_submodule(name, module)

    def _release(self, index: int) -> None:
        """Give back the memory of the weights of block ``index`` that were read again."""
        for name, matrix in self.chosen.items():
            if name.startswith(f"{self.stream.name}.{index}."):
                release_file_pages(dense_weight(matrix.module))

    def advance_to(self, index: int) -> None:
        """Carry the dense model's states to the entrance of block ``index``, through blocks as they were."""
        while self.stream.position < index:
            with self._dense(self.stream.position):
                self.stream.advance(self.stream.position)

    def statistics(
        self, stream: BlockStream, index: int, stage: Mapping[str, Matrix], last: bool
    ) -> dict[str, Statistics]:
        """Of modules that are given the same inputs and not folded yet; ``stream`` holds the folded model's states.

        After the ``last`` stage of a block the dense states stand behind it.
        """
        self.advance_to(index)
        sums = {name: _Sums(matrix) for name, matrix in stage.items()}
        direct = {name: _adds_to_output(stream, index, matrix.module) for name, matrix in stage.items()}
        for k in range(len(stream.hidden)):
            with self._dense(index):
                dense, left = _watch(lambda k=k: self.stream.run(index, self.stream.hidden[k : k + 1]), stage)  # type: ignore[misc]
            folded, leaves = _watch(lambda k=k: stream.run(index, stream.hidden[k : k + 1]), stage)  # type: ignore[misc]
            for name in stage:
                lack = None
                if direct[name] and name in dense and name in folded:
                    lack = (left - dense[name][1]) - (leaves - folded[name][1])
                sums[name].add(dense.get(name), folded.get(name), lack)
            if last:
                self.stream.hidden[k : k + 1] = left
        if last:
            self.stream.position = index + 1
            self._release(index)
        return {name: each.statistics(name) for name, each in sums.items()}


class _Sums:
    """Moments of one module's inputs in both models, about the origin; about the means where there is a bias."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix
        n, m, like = matrix.in_features, matrix.out_features, matrix.parameter
        zeros = lambda *shape: torch.zeros(shape, device=like.device)  # noqa: E731
        self.inputs, self.cross, self.lacks = zeros(n, n), zeros(n, n), zeros(m, n)
        self.means = zeros(n), zeros(n), zeros(m)
        self.tokens, self.paired = 0, True

    def add(
        self, dense: tuple[Tensor, Tensor] | None, folded: tuple[Tensor, Tensor] | None, lack: Tensor | None
    ) -> None:
        if folded is None:
            self.paired &= dense is None
            return
        given = _flat(folded[0])
        self.inputs.addmm_(given.T, given)
        self.tokens += len(given)
        # Experts may be sent other tokens by the two models, which then have no pairs.
        if dense is None or dense[0].shape != folded[0].shape:
            self.paired = False
            return
        wanted = _flat(dense[0])
        self.cross.addmm_(wanted.T, given)
        self.means[0].add_(given.sum(0))
        self.means[1].add_(wanted.sum(0))
        if lack is not None:
            self.lacks.addmm_(_flat(lack).T, given)
            self.means[2].add_(_flat(lack).sum(0))

    def statistics(self, name: str) -> Statistics:
        if not self.tokens:
            raise InputError(f"{name}: not called on the calibration text, so it has no statistics; exclude it.")
        c, a, d = (total.double() / self.tokens for total in (self.inputs, self.cross, self.lacks))
        if not torch.isfinite(c).all():
            raise InputError(f"{name}: its inputs on the calibration text hold NaN or infinity; check the model.")
        if not self.paired:
            return Statistics(inputs=c.float())
        weight, means = dense_weight(self.matrix.module).detach().double(), None
        if self.matrix.bias is not None:
            given, wanted, lack = (total.double() / self.tokens for total in self.means)
            c, a, d = c - given.outer(given), a - wanted.outer(given), d - lack.outer(given)
            means = Means(given.float(), (weight @ wanted + lack).float())
        ridge = RIDGE * c.diagonal().clamp_min(0) + torch.finfo(torch.float32).eps * c.diagonal().mean()
        target = torch.linalg.solve(c + ridge.diag(), (weight @ a + d + weight * ridge).T).T
        return Statistics(inputs=c.float(), target=target.float(), means=means)


def _watch(
    forward: Callable[[], Tensor], stage: Mapping[str, Matrix]
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Inputs and outputs of the modules in one forward pass, those called once; and what it returns."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    twice: set[str] = set()

    def hook(name: str) -> Callable[..., None]:
        def record(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if name in seen:
                twice.add(name)
            seen[name] = args[0], output

        return record

    with ExitStack() as hooks, torch.no_grad():
        for name, matrix in stage.items():
            hooks.callback(matrix.module.register_forward_hook(hook(name)).remove)
        out = forward()
    return {name: pair for name, pair in seen.items() if name not in twice}, out


def _adds_to_output(stream: BlockStream, index: int, module: nn.Module) -> bool:
    """Whether what the module puts out is added to the block's output as it is, with nothing behind it."""
    hidden = stream.hidden[:1]
    noise: list[Tensor] = []

    def disturb(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(output.shape, generator=generator).to(output)
        # As large as the stream, so that rounding in it does not hide the noise; and as rounded when it was added.
        disturbed = output + random * before.float().square().mean().sqrt().to(output.dtype)
        noise.append(disturbed - output)
        return disturbed

    with torch.no_grad():
        before = stream.run(index, hidden)
        handle = module.register_forward_hook(disturb)
        try:
            after = stream.run(index, hidden)
        finally:
            handle.remove()
    if len(noise) != 1 or noise[0].shape != before.shape:
        return False
    change = after.float() - before.float()
    return bool((change - noise[0].float()).norm() < _DIRECT * noise[0].float().norm())


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1]).float()
