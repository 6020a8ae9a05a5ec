"""Error feedback: layers are fitted to the dense model's outputs, given the folded model's inputs.

Notation, for one layer: W (m × n) its dense weight; x (n) its input in the dense model and x̃ (n) in the model folded
so far; d (m) what the hidden states that leave the block lack by now, zero unless the layer's output is added to them
as it is.

The layer should answer x̃ with W x + d. The matrix that does so with the least squared error is the ridge regression

    W̄ = (W A + D + W R) (C + R)⁻¹        A = E[x x̃ᵀ],  C = E[x̃ x̃ᵀ],  D = E[d x̃ᵀ],  R = μ diag C + ν I tr C / n

whose ridge R (n × n, diagonal) pulls it towards W, or towards W in a new basis where the inputs' basis was changed: μ
by each input's own variance, ν by the mean of all, so that what is known of inputs which this text hardly moves stays
as it was. C (n × n) is the input moment, A (n × n) the cross moment and D (m × n) the moment of what is lacking. W̄ is
then folded in W's place. With a bias all moments are central, and the bias makes up for the difference of the means.
GPTQ-style quantisers apply this correction column by column.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tensorfold.algebra.precision import solvable
from tensorfold.algebra.solvers.fewer_units import compensated
from tensorfold.algebra.statistics import Means, Statistics
from tensorfold.calibration.block_calls import input_of
from tensorfold.calibration.block_stream import Allocate, BlockStream, not_finite_inputs
from tensorfold.errors import InputError
from tensorfold.models.anatomy import Matrix, dense_weight
from tensorfold.models.solvable import solvable_weight
from tensorfold.utils.memory import release_file_pages

RIDGE = 0.1  # μ, chosen on held-out windows of a calibration text; see studies/smollm2
_DIRECT = 2e-2  # relative difference that rounding of states in bf16 may make


class Reference:
    """The dense model's hidden states, block by block, beside those of the model that is being folded.

    Args:
        model: Still dense. Its modules in ``chosen`` are replaced later; the reference keeps them.
        windows: Token ids, shape (windows, length).
        chosen: Matrices that will be folded, by name.
        allocate: As for :class:`BlockStream`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Tensor,
        chosen: Mapping[str, Matrix],
        allocate: Allocate | None = None,
    ) -> None:
        self.model, self.chosen = model, chosen
        # Norms and biases of modules that stay, which a refinement changes in place.
        own = tuple(f"{name}." for name in chosen)
        self.vectors = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.dim() == 1 and not name.startswith(own)
        }
        self.stream = BlockStream(model, windows, allocate)
        self.tokens: dict[str, int] = {}  # given to each layer of the stage that was measured last

    @contextmanager
    def _dense(self, index: int) -> Iterator[None]:
        """Put the dense modules of block ``index`` back for as long as the context is open."""
        prefix = f"{self.stream.name}.{index}."
        folded = {}
        for name, matrix in self.chosen.items():
            if name.startswith(prefix) and (module := self.model.get_submodule(name)) is not matrix.module:
                folded[name] = module
        for name in folded:
            self.model.set_submodule(name, self.chosen[name].module)
        refined = {}
        for name, values in self.vectors.items():
            if name.startswith(prefix):
                parameter = self.model.get_parameter(name)
                refined[parameter], parameter.data = parameter.data, values
        try:
            yield
        finally:
            for parameter, values in refined.items():
                parameter.data = values
            for name, module in folded.items():
                self.model.set_submodule(name, module)

    def _release(self, index: int) -> None:
        """Give back the memory of the dense weights of block ``index``, which were read from their file again."""
        for name, matrix in self.chosen.items():
            if name.startswith(f"{self.stream.name}.{index}."):
                release_file_pages(dense_weight(matrix.module))

    def advance_to(self, index: int) -> None:
        """Carry the dense model's hidden states to the entrance of block ``index``, through dense blocks."""
        while self.stream.position < index:
            with self._dense(self.stream.position), self.stream.rounded():
                self.stream.advance(self.stream.position)

    def _window(self, index: int, k: int, last: bool) -> Tensor:
        """Hidden states behind block ``index`` for window ``k``; they replace those before it if ``last``."""
        return self.stream.pass_on(index, k) if last else self.stream.run(index, slice(k, k + 1))

    def statistics(
        self,
        stream: BlockStream,
        index: int,
        stage: Mapping[str, Matrix],
        last: bool,
        towards: Mapping[str, Tensor] = MappingProxyType({}),
        partial_inputs: Container[str] = (),
        ridge: Mapping[str, float] = MappingProxyType({}),
    ) -> dict[str, Statistics]:
        """Moments of the layers of one stage, and the matrix W̄ to fold in the place of each.

        A layer that the two models do not give the same tokens, such as an expert, gets its input moment only; where
        some inputs are gone, also the matrix with what the others make up for on the dense model's tokens.

        Args:
            stream: The folded model's hidden states, at the entrance of block ``index``.
            index: The block that the layers are in.
            stage: Layers that are given the same inputs and are not folded yet, by name.
            last: Whether this is the block's last stage: the dense hidden states then go on to the next block.
            towards: By name, W in the basis of the folded model's inputs, where that is not the dense model's.
            partial_inputs: Names of layers some of whose inputs the folded model does not make any more: their
                ``towards`` is W without those columns.
            ridge: ν by name; 0 by default.

        Raises:
            InputError: A layer was not called on the text, or its inputs hold NaN or infinity.
        """
        self.advance_to(index)
        sums = {name: _Sums(matrix, name in partial_inputs) for name, matrix in stage.items()}
        direct = {name: _adds_to_output(stream, index, matrix.module) for name, matrix in stage.items()}
        whole = last or any(direct.values())  # whether the block's output is wanted
        once = False  # whether the first window has shown that both models call every layer once
        with stream.rounded():
            for k in range(len(stream.windows)):
                with self._dense(index):
                    dense, dense_out = _watch(partial(self._window, index, k, last), stage, stop=once and not whole)
                run = partial(stream.run, index, slice(k, k + 1))
                folded, folded_out = _watch(run, stage, stop=once and not any(direct.values()))
                if k == 0:
                    once = all(len(dense[name]) == len(folded[name]) == 1 for name in stage)
                for name in stage:
                    lack = None
                    if direct[name] and len(dense[name]) == len(folded[name]) == 1:
                        assert dense_out is not None
                        assert folded_out is not None
                        lack = (dense_out - dense[name][0].output) - (folded_out - folded[name][0].output)
                    sums[name].add(dense[name], folded[name], lack, self.stream.windows.shape[1])
        if last:
            self.stream.stand_behind(index)
            self._release(index)
        self.tokens = {name: each.tokens for name, each in sums.items()}
        return {name: each.statistics(name, towards.get(name), ridge.get(name, 0.0)) for name, each in sums.items()}


class _Call(NamedTuple):
    """One call of a layer: its input, shape (..., n), and its output, shape (..., m)."""

    input: Tensor
    output: Tensor


class _Sums:
    """Sums over all calls of one layer for the moments C, A and D; central moments where it has a bias.

    Central moments are summed about the means of the first window: ``E[x xᵀ] − E[x] E[x]ᵀ`` would lose all digits of a
    feature that varies little beside its mean.

    Attributes:
        input_moment: Sum for C, fp32, shape (n, n).
        cross_moment: Sum for A, fp32, shape (n, n).
        lack_moment: Sum for D, fp32, shape (m, n).
        met: Whether the dense model called the layer at all.
        paired: Whether both models gave the layer the same tokens so far; without that A and D mean nothing.
        partial: Whether the folded model does not make some of the inputs any more.
        whole_moment: Sum of x xᵀ, fp32, shape (n, n), over windows of which a partial layer gets some tokens only.
    """

    def __init__(self, matrix: Matrix, partial: bool = False) -> None:
        self.matrix, self.partial = matrix, partial
        n, m, like = matrix.in_features, matrix.out_features, matrix.parameter
        zeros = lambda *shape: torch.zeros(shape, device=like.device)  # noqa: E731
        self.input_moment, self.cross_moment, self.lack_moment = zeros(n, n), zeros(n, n), zeros(m, n)
        self.whole_moment = zeros(n, n) if partial else None
        self.folded, self.dense, self.lack = (_Mean(size, like.device) for size in (n, n, m))  # means of x̃, x, d
        self.tokens, self.paired, self.met = 0, True, False

    def add(self, dense: list[_Call], folded: list[_Call], lack: Tensor | None, length: int) -> None:
        """Add the calls in one window, in the order in which they were made.

        Args:
            dense: Calls in the dense model.
            folded: Calls in the folded model.
            lack: d for every token, shape (..., m); None where the layer's output is not added as it is.
            length: Tokens of the window.
        """
        self.paired = self.paired and len(dense) == len(folded)
        self.met = self.met or bool(dense)
        for call, other in zip(dense, folded, strict=False):
            self.paired = self.paired and _same_tokens(call.input, other.input, length)
        if self.whole_moment is not None and not (self.paired and all(_tokens(call) == length for call in dense)):
            for call in dense:
                self.whole_moment.addmm_(_flat(call.input).T, _flat(call.input))
        if not folded:
            return
        centred = self.matrix.bias is not None
        inputs = torch.cat([_flat(call.input) for call in folded])  # x̃, (tokens, n)
        self.tokens += len(inputs)
        inputs = self.folded.centre(inputs) if centred else inputs
        self.input_moment.addmm_(inputs.T, inputs)
        if not self.paired:
            return
        wanted = torch.cat([_flat(call.input) for call in dense])  # x, (tokens, n)
        self.cross_moment.addmm_((self.dense.centre(wanted) if centred else wanted).T, inputs)
        if lack is not None:
            flat = _flat(lack)  # d, (tokens, m)
            self.lack_moment.addmm_((self.lack.centre(flat) if centred else flat).T, inputs)

    def statistics(self, name: str, towards: Tensor | None = None, mean_ridge: float = 0.0) -> Statistics:
        """The input moment, and where both models gave the layer the same tokens, W̄ and the means for its bias.

        Args:
            name: The layer's, for messages.
            towards: Matrix that the ridge pulls towards, shape (m, n); W by default. Inputs that the one of a partial
                layer leaves out are first put on those that it keeps, by regression.
            mean_ridge: ν of the ridge.

        Raises:
            InputError: The layer was not called, or its inputs hold NaN or infinity.
        """
        if not self.tokens and self.met:  # an expert that the folded model's router sends no token to any more
            return Statistics(target=self._compensated(towards))
        if not self.tokens and self.matrix.group == "experts":
            return Statistics()
        if not self.tokens:
            raise InputError(f"{name}: not called on the calibration text, so it has no statistics; exclude it.")
        sums = self.input_moment, self.cross_moment, self.lack_moment
        c, a, d = (solvable(total).double() / self.tokens for total in sums)  # (n, n), (n, n), (m, n)
        if not torch.isfinite(c).all():
            raise not_finite_inputs(name, self.matrix.module)
        folded, dense, lack = (mean.about(self.tokens) for mean in (self.folded, self.dense, self.lack))
        if not self.paired:
            origin = self.folded.origin
            raw = c + origin.outer(folded) + folded.outer(origin) + origin.outer(origin)
            return Statistics(input_moment=raw.float(), target=self._compensated(towards))
        weight, means = solvable_weight(self.matrix.module).double(), None
        if self.matrix.bias is not None:
            c, a, d = c - folded.outer(folded), a - dense.outer(folded), d - lack.outer(folded)
            # A feature that never varies leaves rounding of either sign in C; it is uncorrelated with everything.
            varies = (c.diagonal() > 0).double()
            c, a, d = c * varies.outer(varies), a * varies, d * varies
            folded, dense, lack = folded + self.folded.origin, dense + self.dense.origin, lack + self.lack.origin
            means = Means(folded, weight @ dense + lack)
        least = max(mean_ridge, torch.finfo(torch.float32).eps) * c.diagonal().mean()
        ridge = RIDGE * c.diagonal().clamp_min(0) + least
        ridge = ridge.clamp_min(torch.finfo(torch.float32).tiny)  # where no feature varies
        prior = weight if towards is None else towards.double()  # (m, n)
        if self.partial:
            prior = prior + torch.linalg.solve(c + ridge.diag(), ((weight - prior) @ a).T).T
        pull = prior * ridge  # (m, n)
        target = torch.linalg.solve(c + ridge.diag(), (weight @ a + d + pull).T).T
        return Statistics(input_moment=c.float(), target=target.float(), means=means)

    def _compensated(self, towards: Tensor | None) -> Tensor | None:
        """W of a partial layer with what its other inputs make up for in the dense model, shape (m, n); else None."""
        if self.whole_moment is None or towards is None or not self.whole_moment.any():
            return None
        kept = towards.any(0).nonzero().squeeze(1)
        moment, target = solvable(self.whole_moment), torch.zeros_like(towards)
        target[:, kept] = compensated(solvable_weight(self.matrix.module), moment, kept).to(target)
        return target


class _Mean:
    """The mean of vectors (size,), kept as an origin near it and the sum of their differences from that origin.

    Both are fp64; the origin's values are fp32 numbers, so that fp32 vectors lose nothing when it is subtracted.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.origin = solvable(torch.zeros(size, device=device)).double()
        self.sum = torch.zeros_like(self.origin)
        self.started = False

    def centre(self, vectors: Tensor) -> Tensor:
        """Subtract the origin from vectors (tokens, size), and add the differences to the sum.

        The origin is the mean of the first vectors that are given.
        """
        if not len(vectors):  # an expert that no token was sent to
            return vectors
        if not self.started:
            self.origin, self.started = solvable(vectors).mean(0, dtype=torch.float64).float().double(), True
        vectors = vectors - self.origin.float().to(vectors.device)
        self.sum += solvable(vectors).sum(0, dtype=torch.float64)
        return vectors

    def about(self, count: int) -> Tensor:
        """The mean of ``count`` vectors less the origin, fp64, shape (size,)."""
        return self.sum / count


def _same_tokens(dense: Tensor, folded: Tensor, length: int) -> bool:
    """Whether two calls got the same tokens in the same order, judged by their inputs (..., n).

    A router may send an expert equally many but other tokens in the two models. Unless a call got all ``length`` tokens
    of the window, each vector has to be at least as near to its partner as to any other vector.
    """
    if dense.shape != folded.shape:
        return False
    x, y = _flat(dense), _flat(folded)
    if len(x) in (0, length):
        return True
    distances = torch.cdist(y, x, compute_mode="donot_use_mm_for_euclid_dist")  # (n, n)
    return bool((distances.diagonal() <= distances.amin(1)).all())


class _Enough(Exception):  # noqa: N818
    """Ends a forward pass of which nothing further is wanted."""


def _watch(
    forward: Callable[[], Tensor], stage: Mapping[str, Matrix], stop: bool = False
) -> tuple[dict[str, list[_Call]], Tensor | None]:
    """Run a forward pass; return the calls of the layers, by name, and the pass's output.

    Args:
        stop: Whether to end the pass, without an output, as soon as every layer was called.
    """
    seen: dict[str, list[_Call]] = {name: [] for name in stage}

    def hook(name: str) -> Callable[..., None]:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            seen[name].append(_Call(input_of(args, kwargs), output))
            if stop and all(seen.values()):
                raise _Enough

        return record

    out = None
    with ExitStack() as hooks, torch.no_grad():
        for name, matrix in stage.items():
            hooks.callback(matrix.module.register_forward_hook(hook(name), with_kwargs=True).remove)
        with suppress(_Enough):
            out = forward()
    return seen, out


def _adds_to_output(stream: BlockStream, index: int, module: nn.Module) -> bool:
    """Whether a module's output is added to the block's output as it is, with nothing in between.

    Noise is added to the module's output on the first window: the block's output then changes by just that noise.
    """
    first = slice(0, 1)
    noise: list[Tensor] = []

    def disturb(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(output.shape, generator=generator).to(output)
        # Noise as large as the hidden states, so that their rounding does not hide it; noted as it was rounded.
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


def _tokens(call: _Call) -> int:
    return call.input[..., 0].numel()


def _flat(tensor: Tensor) -> Tensor:
    """Vectors (..., size) as fp32, shape (tokens, size)."""
    return tensor.detach().reshape(-1, tensor.shape[-1]).float()
