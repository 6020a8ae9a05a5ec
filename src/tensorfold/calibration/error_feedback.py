"""Error feedback: a block is fitted to what the dense model makes of the text, from what the folded one hands it.

A layer of the folded model is given inputs x̃ that the folds before it have changed. What it should put out is what the
dense layer makes of the dense model's own inputs x, and, where its output is added to the stream that leaves the
block, also what that stream lacks by now, d. The matrix that does this best is a regression,

    W̄ = (W A + D + μ W diag C) (C + μ diag C)⁻¹        A = E[x x̃ᵀ],  C = E[x̃ x̃ᵀ],  D = E[d x̃ᵀ]

with a ridge μ that pulls it towards W, or towards W in the basis that its inputs have by now; W̄ is then folded in W's
place. With a bias all moments are taken about the means, and the bias makes up for what the means lack. GPTQ-style
quantisers do the same column by column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tensorfold.algebra.statistics import Means, Statistics
from tensorfold.calibration.block_calls import input_of
from tensorfold.calibration.block_stream import BlockStream, not_finite_inputs
from tensorfold.errors import InputError
from tensorfold.models.anatomy import Matrix, dense_weight
from tensorfold.utils.memory import release_file_pages

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

    def _window(self, index: int, k: int, last: bool) -> Tensor:
        """Output of block ``index`` for window ``k``; it takes the place of the states if it is the ``last`` look."""
        return self.stream.pass_on(index, k) if last else self.stream.run(index, slice(k, k + 1))

    def statistics(
        self,
        stream: BlockStream,
        index: int,
        stage: Mapping[str, Matrix],
        last: bool,
        towards: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> dict[str, Statistics]:
        """Of modules that are given the same inputs and not folded yet; ``stream`` holds the folded model's states.

        After the ``last`` stage of a block the dense states stand behind it. ``towards`` has the matrices of those
        whose inputs are in another basis than the dense model's.
        """
        self.advance_to(index)
        sums = {name: _Sums(matrix) for name, matrix in stage.items()}
        direct = {name: _adds_to_output(stream, index, matrix.module) for name, matrix in stage.items()}
        for k in range(len(stream.windows)):
            with self._dense(index):
                dense, left = _watch(partial(self._window, index, k, last), stage)
            folded, leaves = _watch(partial(stream.run, index, slice(k, k + 1)), stage)
            for name in stage:
                lack = None
                if direct[name] and len(dense[name]) == len(folded[name]) == 1:
                    lack = (left - dense[name][0].output) - (leaves - folded[name][0].output)
                sums[name].add(dense[name], folded[name], lack, self.stream.windows.shape[1])
        if last:
            self.stream.position = index + 1
            self._release(index)
        return {name: each.statistics(name, towards.get(name)) for name, each in sums.items()}


class _Call(NamedTuple):
    """What a module was given, (..., in), and what it gave back, (..., out)."""

    input: Tensor
    output: Tensor


class _Sums:
    """Moments of one module's inputs in both models, over all its calls; about the means where there is a bias.

    Those are summed about the means of the first window, since ``E[x xᵀ] − E[x] E[x]ᵀ`` has no digits of a feature
    that varies little beside its mean.
    """

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix
        n, m, like = matrix.in_features, matrix.out_features, matrix.parameter
        zeros = lambda *shape: torch.zeros(shape, device=like.device)  # noqa: E731
        self.inputs, self.cross, self.lacks = zeros(n, n), zeros(n, n), zeros(m, n)
        self.given, self.wanted, self.lack = (_Mean(size, like.device) for size in (n, n, m))
        self.tokens, self.paired = 0, True

    def add(self, dense: list[_Call], folded: list[_Call], lack: Tensor | None, length: int) -> None:
        """Of one window of ``length`` tokens: the calls in the order in which they were made."""
        self.paired = self.paired and len(dense) == len(folded)
        for call, other in zip(dense, folded, strict=False):
            self.paired = self.paired and _same_tokens(call.input, other.input, length)
        if not folded:
            return
        centred = self.matrix.bias is not None
        given = torch.cat([_flat(call.input) for call in folded])
        self.tokens += len(given)
        given = self.given.centre(given) if centred else given
        self.inputs.addmm_(given.T, given)
        if not self.paired:
            return
        wanted = torch.cat([_flat(call.input) for call in dense])
        self.cross.addmm_((self.wanted.centre(wanted) if centred else wanted).T, given)
        if lack is not None:
            flat = _flat(lack)
            self.lacks.addmm_((self.lack.centre(flat) if centred else flat).T, given)

    def statistics(self, name: str, towards: Tensor | None = None) -> Statistics:
        if not self.tokens:
            raise InputError(f"{name}: not called on the calibration text, so it has no statistics; exclude it.")
        c, a, d = (total.double() / self.tokens for total in (self.inputs, self.cross, self.lacks))
        if not torch.isfinite(c).all():
            raise not_finite_inputs(name, self.matrix.module)
        given, wanted, lack = (mean.about(self.tokens) for mean in (self.given, self.wanted, self.lack))
        if not self.paired:
            about = self.given.origin
            return Statistics(inputs=(c + about.outer(given) + given.outer(about) + about.outer(about)).float())
        weight, means = dense_weight(self.matrix.module).detach().double(), None
        if self.matrix.bias is not None:
            c, a, d = c - given.outer(given), a - wanted.outer(given), d - lack.outer(given)
            # Of a feature that never varies nothing is left but rounding, of either sign; it varies with nothing.
            varies = (c.diagonal() > 0).double()
            c, a, d = c * varies.outer(varies), a * varies, d * varies
            given, wanted, lack = given + self.given.origin, wanted + self.wanted.origin, lack + self.lack.origin
            means = Means(given, weight @ wanted + lack)
        ridge = RIDGE * c.diagonal().clamp_min(0) + torch.finfo(torch.float32).eps * c.diagonal().mean()
        ridge = ridge.clamp_min(torch.finfo(torch.float32).tiny)  # where no feature varies
        pull = (weight if towards is None else towards.double()) * ridge
        target = torch.linalg.solve(c + ridge.diag(), (weight @ a + d + pull).T).T
        return Statistics(inputs=c.float(), target=target.float(), means=means)


class _Mean:
    """Of vectors (size,), kept as an origin near it, fp64 of fp32 numbers, and the sum of what they differ from it."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.origin = torch.zeros(size, dtype=torch.float64, device=device)
        self.sum = torch.zeros_like(self.origin)
        self.started = False

    def centre(self, vectors: Tensor) -> Tensor:
        """The vectors (n, size) less the origin, which is the mean of the first ones; they are added to the sum."""
        if not len(vectors):  # of an expert that was sent nothing
            return vectors
        if not self.started:
            self.origin, self.started = vectors.mean(0, dtype=torch.float64).float().double(), True
        vectors = vectors - self.origin.float()
        self.sum += vectors.sum(0, dtype=torch.float64)
        return vectors

    def about(self, count: int) -> Tensor:
        """The mean of ``count`` vectors less the origin, fp64."""
        return self.sum / count


def _same_tokens(dense: Tensor, folded: Tensor, length: int) -> bool:
    """Whether two calls were given the same tokens in the same order, of a window of ``length``.

    A router may send an expert as many tokens in both models, but others. Where it does not get all of them, each
    vector has to be as near to its partner as to any other.
    """
    if dense.shape != folded.shape:
        return False
    x, y = _flat(dense), _flat(folded)
    if len(x) in (0, length):
        return True
    distances = torch.cdist(y, x, compute_mode="donot_use_mm_for_euclid_dist")  # (n, n)
    return bool((distances.diagonal() <= distances.amin(1)).all())


def _watch(forward: Callable[[], Tensor], stage: Mapping[str, Matrix]) -> tuple[dict[str, list[_Call]], Tensor]:
    """The calls of the modules in one forward pass, and what it returns."""
    seen: dict[str, list[_Call]] = {name: [] for name in stage}

    def hook(name: str) -> Callable[..., None]:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            seen[name].append(_Call(input_of(args, kwargs), output))

        return record

    with ExitStack() as hooks, torch.no_grad():
        for name, matrix in stage.items():
            hooks.callback(matrix.module.register_forward_hook(hook(name), with_kwargs=True).remove)
        out = forward()
    return seen, out


def _adds_to_output(stream: BlockStream, index: int, module: nn.Module) -> bool:
    """Whether what the module puts out is added to the block's output as it is, with nothing behind it."""
    first = slice(0, 1)
    noise: list[Tensor] = []

    def disturb(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(output.shape, generator=generator).to(output)
        # As large as the stream, so that rounding in it does not hide the noise; and as rounded when it was added.
        disturbed = output + random * before.float().square().mean().sqrt().to(output.dtype)
        noise.append(disturbed - output)
        return disturbed

    with torch.no_grad():
        before = stream.run(index, first)
        handle = module.register_forward_hook(disturb)
        try:
            after = stream.run(index, first)
        finally:
            handle.remove()
    if len(noise) != 1 or noise[0].shape != before.shape:
        return False
    change = after.float() - before.float()
    return bool((change - noise[0].float()).norm() < _DIRECT * noise[0].float().norm())


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1]).float()
