"""A linear layer whose weight is a matrix product operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorfold.algebra.contraction.apply import add_bias, apply, stored_factors
from tensorfold.algebra.contraction.paths import ContractionPath, Order
from tensorfold.algebra.contraction.pivots import first_of_pivots, from_pivots, read_first
from tensorfold.algebra.contraction.vector import of_chain, of_part, of_pivots
from tensorfold.algebra.precision import as_given, autocasts, product_dtype, solvable
from tensorfold.algebra.solvers.solve import factorize
from tensorfold.algebra.specs.spec import Spec
from tensorfold.algebra.specs.structure import Structure
from tensorfold.errors import SpecError
from tensorfold.nn.machine_speeds import path_for
from tensorfold.nn.prepared import Function, Prepared
from tensorfold.nn.structured import StructuredLinear
from tensorfold.utils.validation import check_types


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
    _prepared: Prepared | None = None
    _settled: tuple[int | None, int | None] = (None, None)

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
        return cls.from_factors(factorize(solvable(weight.detach()), spec, metric), spec, weight, bias)

    def forward(self, input: Tensor) -> Tensor:
        """Shape ``(..., in_features)`` → ``(..., out_features)``.

        Raises:
            InputError: ``way`` is none of those that there are.
        """
        if not torch.compiler.is_compiling() and self._prepared is not None and self.way is None:
            function = self._prepared.function_for(input)
            if function is not None:
                return function(input)
        return self.cores(self._outputs, input)

    def _outputs(self, x: Tensor) -> Tensor:
        cores = self.cores.tensors()
        training = torch.is_grad_enabled() and (x.requires_grad or any(core.requires_grad for core in cores))
        if not training and not torch.compiler.is_compiling():
            self._prepare(x, cores)
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
        rank, (others, pivots) = self.spec.ranks[0], cores
        others, pivots = others.reshape(-1, rank), pivots.reshape(rank, -1)
        first, reads = self._settled
        if self.in_order is not None:
            x = x.index_select(-1, self.in_order) if reads is None else x[..., :reads]
        # Products into given memory know neither gradients nor autocast.
        plain = not training and x.dtype == pivots.dtype and not torch.compiler.is_compiling()
        plain = plain and not autocasts(x.device.type)
        y = from_pivots(x.reshape(-1, x.shape[-1]), others, pivots, self.out_position, first, plain)
        y = y.reshape(*x.shape[:-1], self.spec.out_features)
        return y if self.bias is None else add_bias(y, self.bias)

    @torch.no_grad()
    def _prepare(self, x: Tensor, cores: list[Tensor]) -> None:
        """Prepare what can be for further inputs like these."""
        stays = self._prepared is not None and self._prepared.is_current() and self._prepared.dtype is x.dtype
        ready = x.is_cpu and x.dtype == cores[0].dtype and x.dtype is not torch.float16
        if stays or not ready or self.way is not None or self.holds_matrix or torch.is_autocast_enabled("cpu"):
            return
        sources = [(self.cores, name) for name in self.cores._parameters]
        if len(sources) != len(cores) or any(tensor.is_inference() for tensor in self._sources()):
            return
        cores = [core.detach() for core in cores]
        one, many = self._of_pivots(x, cores) if self.spec.has_pivot_rows else self._of_chain(x, cores)
        orders = [(self, name) for name in ("bias", "out_position", "in_order")]
        self._prepared = Prepared(x, [*sources, *orders], self.cores, one, many)

    def _of_pivots(self, x: Tensor, cores: list[Tensor]) -> tuple[Function, Function]:
        """Functions of one vector and of many."""
        rank, position, order, bias = self.spec.ranks[0], self.out_position, self.in_order, self.bias
        assert position is not None
        others, pivots = cores[0].reshape(-1, rank), cores[1].reshape(rank, -1)
        first, reads = first_of_pivots(position, rank, rank + len(others)), read_first(order)

        def many(x: Tensor) -> Tensor:
            flat = x.reshape(-1, x.shape[-1])
            if order is not None:
                flat = flat.index_select(1, order) if reads is None else flat[:, :reads]
            y = from_pivots(flat, others, pivots, position, first, True).reshape(*x.shape[:-1], len(position))
            return y if bias is None else y.add_(bias)

        return of_pivots(others, pivots, position, first, order, bias, x.dim()), many

    def _of_chain(self, x: Tensor, cores: list[Tensor]) -> tuple[Function | None, Function | None]:
        """Functions of one vector and of many, where the path takes the cores as they are."""
        if self.spec.sites == 1 and self.spec.is_partial:
            part = of_part(cores[0][0, :, :, 0], self.out_position, self.in_order, self.bias)
            return part, part
        if self.spec.reordered or self.scalars is not None:
            return None, None
        path = path_for(self.spec, 1, False, x.device, x.dtype)
        stored = stored_factors(cores, path)
        return None if stored is None else of_chain(stored, self.spec, path, self.bias, x.dim()), None

    def settle_orders(self, settled: bool) -> None:
        self._settled = (None, None)
        if settled and self.spec.has_pivot_rows and self.out_position is not None:
            first = first_of_pivots(self.out_position, self.spec.ranks[0], self.spec.kept_sizes[0])
            self._settled = first, read_first(self.in_order)

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
        self.holds_matrix, self._matrix, self._prepared = hold, None, None

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
        return {**self.__dict__, "_matrix": None, "_prepared": None}
