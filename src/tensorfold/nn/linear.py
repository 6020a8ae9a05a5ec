"""A linear layer whose weight is a matrix product operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorfold.algebra.contraction.apply import add_bias, apply, to_dense
from tensorfold.algebra.contraction.paths import ContractionPath, Order
from tensorfold.algebra.precision import as_given, product_dtype, wide
from tensorfold.algebra.solvers.pivots import with_identity
from tensorfold.algebra.solvers.solve import Factors, factorize
from tensorfold.algebra.solvers.starts import core_std
from tensorfold.algebra.specs.spec import Spec
from tensorfold.errors import SpecError
from tensorfold.nn.base import StoresOrders, store
from tensorfold.nn.machine_speeds import path_for
from tensorfold.nn.owners import Cores
from tensorfold.utils.validation import check_types

_FEW, _TILE = 64, 512  # tokens


class MPOModule(StoresOrders):
    """Cores of one spec, with the bond scalars and index orders it may have: what linear layer and embedding share."""

    out_position: Tensor | None
    in_order: Tensor | None

    def __init__(self, spec: Spec, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        check_types(type(self).__name__, spec=(spec, Spec))
        self.spec = spec
        self.cores = Cores(nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for shape in spec.stored_shapes)
        self.scalars: nn.Parameter | None = None
        if spec.scalars:
            self.scalars = nn.Parameter(torch.empty(spec.ranks[0], device=device, dtype=dtype))
        # Where each output sits among the operator's rows, behind them where it is zero; and which input each of its
        # columns reads.
        for name, side, size in (
            ("out_position", "out", spec.out_features),
            ("in_order", "in", spec.inner.in_features),
        ):
            order = torch.arange(size, device=device) if side in spec.reordered else None
            if order is not None and name == "out_position":
                order = order.clamp_max(spec.inner.out_features)
            self.register_buffer(name, order)

    def reset_parameters(self, std: float) -> None:
        """Random cores whose product has entries of standard deviation ``std``, for any number of sites."""
        for core in self.cores:
            nn.init.normal_(core, std=core_std(self.spec, std))
        if self.spec.has_pivot_rows:  # they are rows of the matrix, and every other row mixes all of them
            nn.init.normal_(self.cores[0], std=self.spec.ranks[0] ** -0.5)
            nn.init.normal_(self.cores[1], std=std)
        elif self.spec.pivoted and self.spec.grouped == "out":
            nn.init.normal_(self.cores[0], std=std)
            nn.init.normal_(self.cores[1], std=self.spec.ranks[0] ** -0.5)
        elif self.spec.pivoted:  # as many inputs are themselves as are mixed of all the others
            rank, _, others, _ = self.cores[1].shape
            nn.init.normal_(self.cores[1], std=others**-0.5)
            nn.init.normal_(self.cores[0], std=std * (self.spec.in_modes[1] / (2 * rank)) ** 0.5)
        if self.scalars is not None:
            nn.init.ones_(self.scalars)

    def factors(self) -> list[Tensor]:
        """The cores with what is not stored in them: bond scalars in the smaller factor, the identity on pivots.

        Shapes ``spec.core_shapes``. A core in float16 times scalars is in float32, where the product fits.
        """
        cores = self.cores.tensors()
        if self.spec.pivoted:
            return with_identity(cores, self.spec)
        if not self.spec.scalars:
            return cores
        assert self.scalars is not None
        scalars = self.scalars.to(wide(self.scalars.dtype))
        if cores[0].numel() <= cores[1].numel():
            return [cores[0] * scalars, cores[1]]
        return [cores[0], scalars.reshape(-1, 1, 1, 1) * cores[1]]

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix, shape (out_features, in_features), multiplied out in ``dtype`` (the cores' own if None)."""
        dtype = dtype or self.cores[0].dtype
        with as_given(self.cores[0].device.type):
            dense = to_dense([core.to(wide(dtype)) for core in self.factors()], self.spec.inner).to(dtype)
        if self.out_position is not None:
            if self.spec.out_features > len(dense):
                dense = F.pad(dense, (0, 0, 0, 1))
            dense = dense[self.out_position]
        if self.in_order is None:
            return dense
        if self.spec.in_features > dense.shape[1]:
            return dense.new_zeros(len(dense), self.spec.in_features).index_copy(1, self.in_order, dense)
        return dense[:, self.in_order.argsort()]

    @torch.no_grad()
    def load_factors(self, factors: Factors) -> None:
        """Copy a solver's output into parameters and index orders; scalars it does not give are 1."""
        for parameter, core in zip(self.cores, factors.cores, strict=True):
            store(parameter, core[:, -parameter.shape[1] :, -parameter.shape[2] :])  # without the identity on pivots
        if self.scalars is not None:
            store(self.scalars, torch.ones_like(self.scalars) if factors.scalars is None else factors.scalars)
        if self.out_position is not None:
            order = _order(factors.out_order, self.spec.inner.out_features).to(self.out_position.device)
            self.out_position.fill_(len(order))
            self.out_position[order] = torch.arange(len(order), device=order.device)
        if self.in_order is not None:
            self.in_order.copy_(_order(factors.in_order, self.spec.inner.in_features))


def _order(order: Tensor | None, size: int) -> Tensor:
    """The order itself, or the matrix's own where a solver gives none."""
    return torch.arange(size) if order is None else order


class MPOLinear(MPOModule):
    """``y = x Wᵀ + b`` with W an MPO, contracted along the path that is fastest for the number of tokens.

    ``spec.parameters`` numbers and ``spec.macs`` multiply–adds a token (plus the bias). Kronecker products, their sums,
    low rank and tensor-train layers (Novikov et al., arXiv 1509.06569) are all this module with different specs.

    Few tokens are taken through the sites one after the other; for many, where that is more work than the matrix, the
    matrix is multiplied out in the forward and applied as a dense layer's (see ``algebra.contraction``). In a
    traced graph with a free number of tokens there is one path, that for 1024.

    Attributes:
        way: None to choose by cost, or ``"materialise"``, ``"chain"`` (fewest multiply–adds) or an ``Order`` of sites.
        holds_matrix: Whether the matrix is kept between forwards, see :func:`tensorfold.nn.cache_matrices`.

    Args:
        spec: Modes and bonds. Only shapes are needed, so the module can be built on the meta device.
        bias: Whether there is a bias of shape (out_features,).
    """

    way: Order | str | None = None
    holds_matrix = False
    _matrix: tuple[tuple[object, ...], Tensor] | None = None

    def __init__(self, spec: Spec, bias: bool = True, device: Any = None, dtype: torch.dtype | None = None) -> None:
        check_types("MPOLinear", bias=(bias, bool))
        super().__init__(spec, device, dtype)
        self.in_features, self.out_features = spec.in_features, spec.out_features
        self.bias = nn.Parameter(torch.empty(spec.out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None) -> None:
        """Random cores; by default the output variance of a freshly made ``nn.Linear``, whose weights have 1/(3·in)."""
        super().reset_parameters((3 * self.in_features) ** -0.5 if std is None else std)
        if self.bias is not None:
            bound = self.in_features**-0.5
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_dense(cls, weight: Tensor, spec: Spec, bias: Tensor | None = None, metric: Tensor | None = None) -> Self:
        """The closest MPO to ``weight``, in the metric of its inputs where one is given (see ``solve.factorize``).

        Args:
            weight: Shape (out_features, in_features).
            bias: Shape (out_features,), kept exactly; None stays none.
            metric: Second moment of the inputs, shape (in_features, in_features).

        Raises:
            SpecError: A shape does not fit ``spec``, or a value is not finite.
        """
        check_types(cls.__name__, weight=(weight, Tensor), spec=(spec, Spec), bias=(bias, Tensor | None))
        if bias is not None and bias.shape != (spec.out_features,):
            raise SpecError(f"bias of shape {tuple(bias.shape)}; the spec needs ({spec.out_features},).")
        return cls.from_factors(factorize(weight.detach(), spec, metric), spec, weight, bias)

    @classmethod
    def from_factors(cls, factors: Factors, spec: Spec, like: Tensor, bias: Tensor | None = None) -> Self:
        """A layer holding a solver's output, on the device and in the dtype of ``like``."""
        layer = cls(spec, bias is not None, device="meta").to_empty(device=like.device).to(like.dtype)
        layer.load_factors(factors)
        if layer.bias is not None and bias is not None:
            with torch.no_grad():
                layer.bias.copy_(bias)
        return layer

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
        y = apply(x, factors, self.spec.inner, None, path)
        if self.out_features > y.shape[-1]:
            y = F.pad(y, (0, 1))
        y = y.index_select(-1, self.out_position)
        return y if self.bias is None else add_bias(y, self.bias)

    def _from_pivots(self, x: Tensor, cores: list[Tensor], training: bool) -> Tensor:
        """``S x``, the outputs that are pivots, then ``T S x``, all the others from them."""
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
        """The same, as many tokens at a time as stay in the processor's cache until their outputs are in order."""
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
        """The path that ``tokens`` vectors take through this layer on its own device; ``str`` names it."""
        core = self.cores[0]
        return path_for(self.spec, tokens, training, core.device, core.dtype, self.way)

    def hold_matrix(self, hold: bool) -> None:
        """Keep the matrix between forwards without gradients, or drop it and keep none."""
        self.holds_matrix, self._matrix = hold, None

    def _sources(self) -> list[Tensor]:
        """What the matrix is made of."""
        others = (self.scalars, self.out_position, self.in_order)
        return [*self.cores.tensors(), *(tensor for tensor in others if tensor is not None)]

    @torch.no_grad()
    def _held_matrix(self) -> Tensor:
        """The matrix as of the parameters' present values; assignments to ``.data`` go unseen."""
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

    def extra_repr(self) -> str:
        return f"{self.spec}, in={self.in_features}, out={self.out_features}, bias={self.bias is not None}"
