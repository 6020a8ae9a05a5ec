"""A linear layer whose weight is a matrix product operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorfold.algebra.contraction.apply import add_bias, apply
from tensorfold.algebra.contraction.paths import ContractionPath, Order
from tensorfold.algebra.precision import as_given, product_dtype
from tensorfold.algebra.solvers.solve import factorize
from tensorfold.algebra.specs.spec import Spec
from tensorfold.algebra.specs.structure import Structure
from tensorfold.errors import SpecError
from tensorfold.nn.machine_speeds import path_for
from tensorfold.nn.structured import StructuredLinear
from tensorfold.utils.validation import check_types

_FEW, _TILE = 64, 512  # tokens from which pivots are computed in tiles, and tokens of a tile


class MPOLinear(StructuredLinear):
    """``y = x Wᵀ + b`` with W an MPO, contracted along the path that is fastest for the number of tokens.

    ``spec.parameters`` numbers and ``spec.macs`` multiply–adds a token (plus the bias). Kronecker products, their sums,
    low rank and tensor-train layers (Novikov et al., arXiv 1509.06569) are all this module with different specs.

    Few tokens are taken through the sites one after the other; for many, where that is more work than the matrix, the
    matrix is multiplied out in the forward and applied as a dense layer's (see ``algebra.contraction``). In a
    traced graph with a free number of tokens there is one path, that for 1024.

    Attributes:
        way: Way of computing: None to choose by cost, ``"materialise"``, ``"chain"`` (the order of sites with the
            fewest multiply–adds) or an ``Order`` of sites.

    Args:
        spec: Modes and bonds. Only shapes are needed, so the module can be built on the meta device.
        bias: Whether there is a bias of shape (out_features,).
    """

    structure: ClassVar[type[Structure]] = Spec
    ways: ClassVar[tuple[str, ...]] = ("materialise", "chain")

    spec: Spec
    way: Order | str | None = None
    _matrix: tuple[tuple[object, ...], Tensor] | None = None

    @classmethod
    def from_dense(cls, weight: Tensor, spec: Spec, bias: Tensor | None = None, metric: Tensor | None = None) -> Self:
        """Fit an MPO to a weight and make the layer.

        Args:
            weight: W, shape (out_features, in_features).
            spec: Modes and bonds.
            bias: Shape (out_features,), kept exactly; None for no bias.
            metric: C of the error ``‖(W − Ŵ) C^½‖`` that is minimised, the second moment of the inputs, shape
                (in_features, in_features); the identity if None.

        Raises:
            SpecError: A shape does not fit ``spec``, or a value is not finite.
        """
        check_types(cls.__name__, weight=(weight, Tensor), spec=(spec, Spec), bias=(bias, Tensor | None))
        if bias is not None and bias.shape != (spec.out_features,):
            raise SpecError(f"bias of shape {tuple(bias.shape)}; the spec needs ({spec.out_features},).")
        return cls.from_factors(factorize(weight.detach(), spec, metric), spec, weight, bias)

    def forward(self, input: Tensor) -> Tensor:
        """Shape ``(..., in_features)`` → ``(..., out_features)``.

        Raises:
            InputError: ``way`` is none of those that there are.
        """
        return self.cores(self._outputs, input)

    def _outputs(self, x: Tensor) -> Tensor:
        cores = self.cores.tensors()
        training = torch.is_grad_enabled() and (x.requires_grad or any(core.requires_grad for core in cores))
        if self.spec.has_pivot_rows and not self.holds_matrix:  # there is one way only
            return self._from_pivots(x, cores, training)
        path = path_for(self.spec, math.prod(x.shape[:-1]), training, x.device, x.dtype, self.way)
        holds = self.holds_matrix and self.way is None and not training and not torch.compiler.is_compiling()
        # Nothing tells whether tensors that were made under inference mode have changed since.
        holds = holds and not any(tensor.is_inference() for tensor in self._sources())
        if holds and path.dense < path.seconds:
            return F.linear(x, self._held_matrix(), self.bias)
        if self.spec.has_pivot_rows:
            return self._from_pivots(x, cores, training)
        factors = self.factors()
        if not self.spec.reordered:  # looked up faster than a buffer that may be None
            return apply(x, factors, self.spec, self.bias, path)
        if self.in_order is not None:
            x = x.index_select(-1, self.in_order)
        if self.out_position is None:
            return apply(x, factors, self.spec.inner, self.bias, path)
        y = self._in_own_order(apply(x, factors, self.spec.inner, None, path))
        return y if self.bias is None else add_bias(y, self.bias)

    def _from_pivots(self, x: Tensor, cores: list[Tensor], training: bool) -> Tensor:
        """``[I; T] S x`` in the outputs' own order, plus the bias: the pivots S x first, the other outputs from them.

        Args:
            x: Shape (..., in_features).
            cores: T (out − r, r) and S (r, in) as cores.
            training: Whether a gradient is asked for.
        """
        assert self.out_position is not None
        if product_dtype(x) is torch.float16:
            with as_given(x.device.type):
                return self._from_pivots(x.float(), [core.float() for core in cores], training).half()
        rank, others, pivots = self.spec.ranks[0], *cores
        others, pivots = others.reshape(-1, rank), pivots.reshape(rank, -1)
        if self.in_order is not None:
            x = x.index_select(-1, self.in_order)
        # Products into given memory know neither gradients nor autocast.
        plain = x.dtype == pivots.dtype and not (training or torch.is_autocast_enabled(x.device.type))
        if plain and not torch.compiler.is_compiling() and math.prod(x.shape[:-1]) >= _FEW:
            y = self._in_tiles(x, others.T, pivots.T)
        else:
            known = F.linear(x, pivots)
            parts = [known, F.linear(known, others)]
            if self.out_features > rank + len(others):
                parts.append(known.new_zeros(*known.shape[:-1], 1))
            y = torch.cat(parts, dim=-1).index_select(-1, self.out_position)
        return y if self.bias is None else add_bias(y, self.bias)

    def _in_tiles(self, x: Tensor, others: Tensor, pivots: Tensor) -> Tensor:
        """``[I; T] S x`` in the outputs' own order, in tiles of tokens that stay in the processor's cache meanwhile.

        Args:
            x: Shape (..., in).
            others: Tᵀ, (r, out − r).
            pivots: Sᵀ, (in, r).
        """
        flat, rank, order = x.reshape(-1, x.shape[-1]), self.spec.ranks[0], self.out_position
        assert order is not None
        made = rank + others.shape[1]
        size = min(len(flat), _TILE if x.device.type == "cpu" else len(flat))
        y = flat.new_empty(len(flat), self.out_features)
        space = flat.new_zeros(size, min(made + 1, self.out_features))  # with a zero behind, where outputs are zero
        for start in range(0, len(flat), max(size, 1)):
            part = flat[start : start + size]
            outputs = space[: len(part)]
            known = outputs[:, :rank]
            torch.mm(part, pivots, out=known)
            torch.mm(known, others, out=outputs[:, rank:made])
            torch.index_select(outputs, -1, order, out=y[start : start + size])
        return y.reshape(*x.shape[:-1], self.out_features)

    def chosen(self, tokens: int, training: bool = False) -> ContractionPath:
        """Contraction path of this many vectors through the layer on its own device; ``str`` names it."""
        core = self.cores[0]
        return path_for(self.spec, tokens, training, core.device, core.dtype, self.way)

    def _uses_held_matrix(self, tokens: int) -> bool:
        path = self.chosen(tokens)
        return self.holds_matrix and self.way is None and path.dense < path.seconds

    def macs(self, tokens: int) -> float:
        if self._uses_held_matrix(tokens):
            return self.spec.dense_parameters
        path = self.chosen(tokens)
        return path.macs + path.build / tokens

    def way_taken(self, tokens: int) -> str:
        return "held matrix" if self._uses_held_matrix(tokens) else str(self.chosen(tokens))

    def seconds_saved(self, tokens: int) -> float:
        path = self.chosen(tokens)
        return 0.0 if self.way is not None else max(path.seconds - path.dense, 0.0)

    def hold_matrix(self, hold: bool) -> None:
        self.holds_matrix, self._matrix = hold, None

    def _sources(self) -> list[Tensor]:
        """Tensors that the matrix is made of: cores, scalars and orders."""
        others = (self.scalars, self.out_position, self.in_order)
        return [*self.cores.tensors(), *(tensor for tensor in others if tensor is not None)]

    @torch.no_grad()
    def _held_matrix(self) -> Tensor:
        """Matrix kept from an earlier forward, made again where a parameter has changed, except through ``.data``."""
        now = tuple((tensor.data_ptr(), tensor._version) for tensor in self._sources())
        if self._matrix is None or self._matrix[0] != now:
            self._matrix = None  # not two of them at a time
            self._matrix = now, self.to_dense()
        return self._matrix[1]

    def train(self, mode: bool = True) -> Self:
        self._matrix = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._matrix = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_matrix": None}
