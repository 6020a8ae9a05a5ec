"""Base classes of modules that stand in for a dense weight: stored orders, cores, tables."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorfold.algebra.orders.stored_orders import order_dtype
from tensorfold.algebra.solvers.solve import Factors
from tensorfold.errors import SpecError
from tensorfold.nn.owners import Cores

ORDERS = ("out_position", "in_order", "position")  # names of the buffers that hold them


class StoresOrders(nn.Module):
    """A module with orders of rows or columns among its buffers.

    In memory they are int64, which indexing is fastest with; in a state dictionary, and so in files, whole numbers of
    the smallest type that fits. Files with orders in int64, as earlier versions wrote them, load as well.
    """

    spec: Any

    def _orders(self) -> dict[str, int]:
        """Largest number that each order among the buffers may hold, by the buffer's name."""
        sizes = {"in_order": self.spec.in_features}
        return {name: sizes.get(name, self.spec.out_features) for name in ORDERS if self._buffers.get(name) is not None}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, largest in self._orders().items():
            if (key := prefix + name) in destination:
                destination[key] = destination[key].to(order_dtype(largest))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        for name in self._orders():
            if (key := prefix + name) in state_dict:
                state_dict[key] = state_dict[key].to(torch.int64)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def widen_orders(self) -> None:
        """Convert to int64 orders that were assigned in the type that they are stored in."""
        for name in self._orders():
            self._buffers[name] = self.get_buffer(name).to(torch.int64)

    def share_orders(self, table: nn.Module) -> None:
        """Use the orders of the table that this head is tied to; they are stored with the table alone."""
        for name in self._orders():
            self.register_buffer(name, table._buffers[name], persistent=False)


class FoldedModule(StoresOrders, ABC):
    """Cores in place of a dense weight: how other code recognises a folded module, whatever its structure.

    Attributes:
        spec: Structure of the matrix.
        cores: Stored parts of the factors, shapes ``spec.stored_shapes``.
        scalars: One number per bond index, where the structure has them; else None.
        ways: Names of the ways of computing that can be asked for, besides the one chosen by cost.
        way: Way of computing that is asked for; None to choose by cost.
        holds_matrix: Whether the matrix is kept between forwards, see :func:`tensorfold.nn.cache_matrices`.
    """

    cores: Cores
    scalars: nn.Parameter | None
    ways: ClassVar[tuple[str, ...]] = ()
    way: Any = None
    holds_matrix = False

    @abstractmethod
    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Matrix W, shape (out_features, in_features), multiplied out in ``dtype`` (the cores' own if None)."""

    @abstractmethod
    def load_factors(self, factors: Factors) -> None:
        """Copy a solver's output into the parameters and orders.

        Raises:
            SpecError: A number is too large for the parameters' dtype.
        """

    def macs(self, tokens: int) -> float:
        """Multiply–adds a token where this many are computed at once: work done once a forward is divided by them."""
        return float(self.spec.macs)

    def way_taken(self, tokens: int) -> str:
        """Name of the way in which this many tokens are computed, for reports."""
        return "own"

    def hold_matrix(self, hold: bool) -> None:
        """Keep the dense matrix between forwards without gradients, or drop it; no effect where none can be kept."""

    def settle_orders(self, settled: bool) -> None:
        """Let graphs that are traced from now on take stored orders that are runs for what they are, or no longer.

        In a graph nobody could tell whether orders have changed since; elsewhere they are looked at.
        """

    def seconds_saved(self, tokens: int) -> float:
        """Estimated seconds that a kept matrix saves in one forward of this many tokens; 0 where none can be kept."""
        return 0.0


class FoldedTable(FoldedModule):
    """Cores in place of an embedding table.

    Attributes:
        scale: Constant factor on every row, as Gemma applies it; ``to_dense`` is without it.
        embedding_dim: Columns of the table, its width.
        grows: Whether tokens can be added, because they share no cores with others.
    """

    scale: float
    embedding_dim: int
    grows: ClassVar[bool] = False

    @abstractmethod
    def append(self, vectors: Tensor) -> None:
        """Add tokens with these rows, shape (new tokens, width).

        Raises:
            SpecError: The table does not grow, or the rows do not fit it.
        """

    @abstractmethod
    def head(self, bias: Tensor | None = None) -> FoldedModule:
        """Output head ``h ↦ h Eᵀ + bias`` tied to the table E: it uses these very parameters, not copies."""

    def macs(self, tokens: int) -> float:
        """Multiply–adds of looking up one row."""
        return float(self.spec.row_macs)


def in_table(index: Tensor, size: int) -> Tensor:
    """Let torch check that token indices (n,) are in [0, size), as nn.Embedding does, and return them.

    A column of zeros, as long as the table and stored as one number, is looked up: that operation has its own check in
    eager mode, in compiled code and in exported graphs, and needs no value on the way. Other operations count negative
    indices from the end, some only when compiled.

    Raises:
        IndexError: An index is out of range, in eager mode; compiled code and graphs raise their own error.
    """
    return index + F.embedding(index, index.new_zeros(1, 1).expand(size, 1)).squeeze(-1)


def store(parameter: Tensor, values: Tensor) -> None:
    """Copy a solver's numbers into a parameter of their shape.

    Raises:
        SpecError: They are too large for its dtype.
    """
    parameter.copy_(values)
    if parameter.dtype is torch.float16 and not bool(parameter.isfinite().all()):
        raise SpecError(
            f"factors with numbers up to {float(values.abs().max()):.1e}, and {parameter.dtype} ends at "
            f"{torch.finfo(parameter.dtype).max:.0f}; load the model in bfloat16 or float32."
        )
