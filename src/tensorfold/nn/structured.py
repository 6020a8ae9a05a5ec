"""Linear layers, embedding tables and tied heads of any structure.

A structure with faster ways has subclasses of these, which name it as their ``structure``; :func:`linear_class` and
:func:`table_class` find them.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorfold.algebra.contraction.apply import add_bias
from tensorfold.algebra.precision import as_given, product_dtype, wide
from tensorfold.algebra.solvers.solve import Factors
from tensorfold.algebra.specs.structure import Structure
from tensorfold.errors import SpecError
from tensorfold.nn.base import FoldedModule, FoldedTable, in_table, store
from tensorfold.nn.owners import Cores
from tensorfold.utils.validation import check_types

_LINEARS: dict[type[Structure], type[StructuredLinear]] = {}
_TABLES: dict[type[Structure], type[StructuredTable]] = {}


def linear_class(spec: Structure) -> type[StructuredLinear]:
    """Class of linear layers, and of tied heads, for a structure: of its nearest base class that has one."""
    return next(_LINEARS[kind] for kind in type(spec).__mro__ if kind in _LINEARS)


def table_class(spec: Structure) -> type[StructuredTable]:
    """Class of embedding tables for a structure: of its nearest base class that has one."""
    return next(_TABLES[kind] for kind in type(spec).__mro__ if kind in _TABLES)


class StructuredModule(FoldedModule):
    """Cores of one structure, with the bond scalars and index orders that it may have; base of layers and tables.

    Attributes:
        structure: Structure that the class is for.
        position_buffer: Name of the buffer that holds ``out_position``.
        out_position: Place of each output among the structure's rows, int64, shape (out_features,); one behind the last
            row for outputs that are zero. None where rows are in their own order.
        in_order: Input that each of the structure's columns reads, int64, shape (columns,). None where columns are in
            their own order.
    """

    structure: ClassVar[type[Structure]] = Structure  # type: ignore[type-abstract]
    position_buffer: ClassVar[str] = "out_position"

    out_position: Tensor | None
    in_order: Tensor | None

    def __init__(self, spec: Structure, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        check_types(type(self).__name__, spec=(spec, self.structure))
        self.spec = spec
        self.cores = Cores(nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for shape in spec.stored_shapes)
        self.scalars: nn.Parameter | None = None
        if spec.scalar_count:
            self.scalars = nn.Parameter(torch.empty(spec.scalar_count, device=device, dtype=dtype))
        rows, columns = spec.kept_sizes
        position = torch.arange(spec.out_features, device=device).clamp_max(rows) if "out" in spec.reordered else None
        self.register_buffer(self.position_buffer, position)
        self.register_buffer("in_order", torch.arange(columns, device=device) if "in" in spec.reordered else None)

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Fill the cores with random numbers for which the matrix has entries of standard deviation about ``std``."""
        for core, own in zip(self.cores, self.spec.initial_stds(std), strict=True):
            nn.init.normal_(core, std=own)
        if self.scalars is not None:
            nn.init.ones_(self.scalars)

    def factors(self) -> list[Tensor]:
        """Cores of shapes ``spec.core_shapes``: scalars multiplied in, parts that are not stored added."""
        return self.spec.complete(self.cores.tensors(), self.scalars)

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Matrix W, shape (out_features, in_features), multiplied out in ``dtype`` (the cores' own if None)."""
        dtype = dtype or self.cores[0].dtype
        with as_given(self.cores[0].device.type):
            dense = self.spec.dense([core.to(wide(dtype)) for core in self.factors()]).to(dtype)
        position = self._buffers[self.position_buffer]
        if position is not None:
            if self.spec.out_features > len(dense):
                dense = F.pad(dense, (0, 0, 0, 1))
            dense = dense[position]
        if self.in_order is None:
            return dense
        if self.spec.in_features > dense.shape[1]:
            return dense.new_zeros(len(dense), self.spec.in_features).index_copy(1, self.in_order, dense)
        return dense[:, self.in_order.argsort()]

    @torch.no_grad()
    def load_factors(self, factors: Factors) -> None:
        """Copy a solver's output into parameters and index orders; scalars that it does not give become 1."""
        for parameter, core in zip(self.cores, factors.cores, strict=True):
            # What is not stored, the identity on pivots, comes first on its axis.
            store(parameter, core[tuple(slice(core.shape[k] - n, None) for k, n in enumerate(parameter.shape))])
        if self.scalars is not None:
            store(self.scalars, torch.ones_like(self.scalars) if factors.scalars is None else factors.scalars)
        rows, columns = self.spec.kept_sizes
        position = self._buffers[self.position_buffer]
        if position is not None:
            order = _order(factors.out_order, rows).to(position.device)
            position.fill_(len(order))
            position[order] = torch.arange(len(order), device=order.device)
        if self.in_order is not None:
            self.in_order.copy_(_order(factors.in_order, columns))


def _order(order: Tensor | None, size: int) -> Tensor:
    """Index order (size,) that a solver gave, or 0, 1, … where it gave none."""
    return torch.arange(size) if order is None else order


class StructuredLinear(StructuredModule):
    """``y = x Wᵀ + b`` with W of any structure; also the head tied to a table of that structure.

    Args:
        spec: Structure of W. Only shapes are needed, so the module can be built on the meta device.
        bias: Whether there is a bias of shape (out_features,).
    """

    ways: ClassVar[tuple[str, ...]] = ("materialise",)

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "structure" in cls.__dict__:
            _LINEARS[cls.structure] = cls

    def __init__(
        self, spec: Structure, bias: bool = True, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        check_types(type(self).__name__, bias=(bias, bool))
        super().__init__(spec, device, dtype)
        self.bias = nn.Parameter(torch.empty(spec.out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @property
    def in_features(self) -> int:
        """Columns of the matrix."""
        return int(self.spec.in_features)

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return int(self.spec.out_features)

    @torch.no_grad()
    def reset_parameters(self, std: float | None = None) -> None:
        """Fill cores and bias with random numbers.

        Args:
            std: Standard deviation of the entries of W; that of a new ``nn.Linear``, √(1 / (3·in)), if None.
        """
        super().reset_parameters((3 * self.spec.in_features) ** -0.5 if std is None else std)
        if self.bias is not None:
            bound = self.spec.in_features**-0.5
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_factors(cls, factors: Factors, spec: Structure, like: Tensor, bias: Tensor | None = None) -> Self:
        """Make a layer that holds a solver's output.

        Args:
            factors: Cores, scalars and orders.
            spec: Their structure.
            like: A tensor on the device and in the dtype that the layer is to have.
            bias: Shape (out_features,); None for no bias.
        """
        layer = cls(spec, bias is not None, device="meta").to_empty(device=like.device).to(like.dtype)
        layer.load_factors(factors)
        if layer.bias is not None and bias is not None:
            with torch.no_grad():
                layer.bias.copy_(bias)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Shape ``(..., in_features)`` → ``(..., out_features)``."""
        return self.cores(self._outputs, input)  # through the cores' own forward, which hooks watch: see nn.owners

    def _outputs(self, x: Tensor) -> Tensor:
        if self.way == "materialise":
            return F.linear(x, self.to_dense(), self.bias)
        factors = self.factors()
        if product_dtype(x) is torch.float16:
            with as_given(x.device.type):
                y = self._product(x.float(), [factor.float() for factor in factors]).half()
        else:
            y = self._product(x, factors)
        return y if self.bias is None else add_bias(y, self.bias)

    def _product(self, x: Tensor, factors: list[Tensor]) -> Tensor:
        """``x Wᵀ``, shape (..., in) → (..., out), both sides in the matrix's own order."""
        y = self.spec.apply(x if self.in_order is None else x.index_select(-1, self.in_order), factors)
        return self._in_own_order(y)

    def _in_own_order(self, y: Tensor) -> Tensor:
        """Bring outputs from the structure's order into the matrix's own; outputs that it leaves out become zero."""
        position = self._buffers[self.position_buffer]
        if position is None:
            return y
        if self.spec.out_features > y.shape[-1]:
            y = F.pad(y, (0, 1))
        return y.index_select(-1, position)

    def extra_repr(self) -> str:
        return f"{self.spec}, in={self.in_features}, out={self.out_features}, bias={self.bias is not None}"


class StructuredTable(StructuredModule, FoldedTable):
    """Token index → row of the table ``E`` (vocabulary, width) of any structure.

    Args:
        spec: ``out_features`` is the vocabulary, ``in_features`` the width.
        scale: Constant factor on every row, as Gemma applies it.
    """

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "structure" in cls.__dict__:
            _TABLES[cls.structure] = cls

    def __init__(
        self, spec: Structure, scale: float = 1.0, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(spec, device, dtype)
        if spec.kept_sizes != (spec.out_features, spec.in_features):
            raise SpecError(
                f"{type(self).__name__}: {spec} leaves rows or columns out; a table needs all, only linear layers may."
            )
        self.embedding_dim = spec.in_features
        self.scale = scale
        self.reset_parameters(1.0)

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return int(self.spec.out_features)

    @classmethod
    def from_factors(cls, factors: Factors, spec: Structure, like: Tensor, scale: float = 1.0) -> Self:
        """Make a table that holds a solver's output.

        Args:
            factors: Cores, scalars and orders.
            spec: Their structure.
            like: A tensor on the device and in the dtype that the table is to have.
            scale: Constant factor on every row.
        """
        table = cls(spec, scale, device="meta").to_empty(device=like.device).to(like.dtype)
        table.load_factors(factors)
        return table

    def forward(self, input: Tensor) -> Tensor:
        """Integers of shape ``(...)`` → ``(..., width)``.

        Raises:
            IndexError: One of them is not in the vocabulary, as ``nn.Embedding`` says it.
        """
        return self.cores(self._rows, input)  # through the cores' own forward, which hooks watch: see nn.owners

    def _rows(self, index: Tensor) -> Tensor:
        place = in_table(index.reshape(-1), self.num_embeddings)
        position = self._buffers[self.position_buffer]
        if position is not None:
            place = position[place]
        with as_given(index.device.type):
            out = self.spec.rows(place, self.factors())
        return self._scaled(out.to(self.cores[0].dtype), index)

    def _scaled(self, rows: Tensor, index: Tensor) -> Tensor:
        """Rows (tokens, width) reshaped to (..., width) for an index (...), columns in their own order, times scale."""
        out = rows.reshape(*index.shape, self.embedding_dim)
        if self.in_order is not None:
            out = out[..., self.in_order.argsort()]
        return out if self.scale == 1.0 else out * torch.tensor(self.scale, dtype=out.dtype, device=out.device)

    def append(self, vectors: Tensor) -> None:
        """Refuse to add rows, since they would share cores with others.

        Raises:
            SpecError: Always; a table that ``grows`` overrides this.
        """
        raise SpecError(f"{type(self).__name__}: its rows share cores, so none can be added; fold the larger table.")

    def head(self, bias: Tensor | None = None) -> StructuredLinear:
        """Output head ``h ↦ h Eᵀ + bias`` tied to the table E: a linear layer over these very parameters, not copies.

        It uses the table's index orders, which are stored with the table alone.

        Args:
            bias: Shape (vocabulary,); None for no bias.
        """
        head = linear_class(self.spec)(self.spec, bias is not None, device="meta")
        for k, core in enumerate(self.cores):
            head.cores[k] = core
        head.scalars = self.scalars
        head.share_orders(self)
        if bias is not None:
            head.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return head

    def extra_repr(self) -> str:
        return f"{self.spec}, vocabulary={self.num_embeddings}, width={self.embedding_dim}"


_LINEARS[Structure], _TABLES[Structure] = StructuredLinear, StructuredTable  # type: ignore[type-abstract]
