"""A mixture's experts as linear layers of their own, in the place of the one tensor that a model keeps them in.

Notation:
    E       experts
    m, n    outputs and inputs of each
    s       rows: a token and one of the experts that it is sent to
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorfold.nn.base import FoldedModule


class ExpertStack(nn.Module):
    """Modules that compute ``x W_eᵀ`` in the place of a tensor (E, m, n), or (E, n, m) if ``turned``.

    The model's code that indexes, transposes and multiplies with that tensor works as before, in every one of
    transformers' ways (``eager``, ``batched_mm``, ``grouped_mm``): products with vectors are computed by the module of
    the expert that they are sent to, so that hooks on it see them; in any other function the tensor itself takes part,
    multiplied out. A subclass says how a product is computed.

    Attributes:
        turned: Whether the tensor held (E, n, m).
    """

    turned: bool

    @property
    def experts(self) -> int:
        """Number of experts E."""
        raise NotImplementedError

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Outputs and inputs of an expert, (m, n)."""
        raise NotImplementedError

    def product(self, expert: int, x: Tensor) -> Tensor:
        """``x W_eᵀ`` of one expert, shape (..., n) → (..., m)."""
        raise NotImplementedError

    def matrices(self) -> Tensor:
        """The matrices W_e, shape (E, m, n), multiplied out."""
        raise NotImplementedError

    def tensor(self) -> Tensor:
        """The tensor as the model kept it: (E, m, n), or (E, n, m) if ``turned``."""
        found = self.matrices()
        return found.mT.contiguous() if self.turned else found

    def rows_by_expert(self, x: Tensor, index: Tensor) -> Tensor:
        """Products of rows (s, n) with the matrices of their experts, indices (s,): shape (s, m)."""
        order = index.argsort(stable=True)
        counts = torch.bincount(index, minlength=self.experts).tolist()
        return self.grouped_rows(x[order], counts)[order.argsort()]

    def grouped_rows(self, x: Tensor, counts: Iterable[int]) -> Tensor:
        """Products of rows (s, n) that are sorted by expert, of which so many are of each; further rows become zero."""
        parts, start = [], 0
        for expert, count in enumerate(counts):
            if count:
                parts.append(self.product(expert, x[start : start + count]))
                start += count
        if start < len(x) or not parts:
            parts.append(x.new_zeros(len(x) - start, self.matrix_shape[0], dtype=parts[0].dtype if parts else x.dtype))
        return torch.cat(parts)

    @property
    def whole(self) -> ExpertWeights:
        """All matrices, as the operand that they are in the model's code."""
        return ExpertWeights(self, None, self.turned)

    def __getitem__(self, index: Any) -> Any:
        return self.whole[index]

    def transpose(self, first: int, second: int) -> Any:
        """The tensor with two of its axes exchanged."""
        return self.whole.transpose(first, second)

    @property
    def mT(self) -> Any:  # noqa: N802  (torch's name)
        """The tensor with its last two axes exchanged."""
        return self.whole.mT

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        return self.whole.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters in floating point."""
        return next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    def dim(self) -> int:
        """Number of the tensor's axes."""
        return 3

    def data_ptr(self) -> int:
        """0: no address of its own."""
        return 0

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tuple(each.whole if isinstance(each, ExpertStack) else each for each in args)
        named = {key: v.whole if isinstance(v, ExpertStack) else v for key, v in (kwargs or {}).items()}
        return ExpertWeights.__torch_function__(function, types, given, named)


class ExpertLinears(ExpertStack):
    """A linear layer, dense or folded, for each expert.

    Args:
        layers: Modules that compute ``x W_eᵀ``, without bias, by their order; they are called ``0``, ``1``, ….
        turned: Whether the tensor that they stand for holds (E, n, m).
    """

    def __init__(self, layers: Iterable[nn.Module], turned: bool = False) -> None:
        super().__init__()
        self.turned = turned
        for index, layer in enumerate(layers):
            self.add_module(str(index), layer)
        first: Any = self._modules["0"]
        self._matrix_shape = first.out_features, first.in_features  # in int8 a layer does not say

    @property
    def experts(self) -> int:
        return len(self._modules)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self._matrix_shape

    def product(self, expert: int, x: Tensor) -> Tensor:
        layer = self._modules[str(expert)]
        assert layer is not None
        y: Tensor = layer(x)
        return y

    def matrices(self) -> Tensor:
        return torch.stack([_weight(layer) for layer in self.children()])


def _weight(layer: nn.Module) -> Tensor:
    """Weight of a dense or folded linear layer, (m, n), in the dtype of its parameters."""
    if isinstance(layer, FoldedModule):
        dtype = layer.cores[0].dtype
        return layer.to_dense(torch.promote_types(dtype, torch.float32)).to(dtype)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


class ExpertWeights:
    """Matrices of some experts as an operand: what indexing and transposing an :class:`ExpertStack` gives.

    Args:
        stack: The experts.
        index: None for all of them, (E, …); an expert's number for its matrix alone; or numbers (s,), one for each row.
        turned: Whether the matrices are W_eᵀ, (n, m), or W_e, (m, n).
    """

    def __init__(self, stack: ExpertStack, index: int | Tensor | None, turned: bool) -> None:
        self.stack, self.index, self.turned = stack, index, turned

    @property
    def shape(self) -> torch.Size:
        matrix = self.stack.matrix_shape
        matrix = matrix[::-1] if self.turned else matrix
        if isinstance(self.index, int):
            return torch.Size(matrix)
        return torch.Size((self.stack.experts if self.index is None else len(self.index), *matrix))

    @property
    def dtype(self) -> torch.dtype:
        return self.stack.dtype

    @property
    def device(self) -> torch.device:
        return self.stack.device

    def dim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def size(self, axis: int | None = None) -> Any:
        """Shape, or the length of one axis."""
        return self.shape if axis is None else self.shape[axis]

    def data_ptr(self) -> int:
        """0: no address of its own."""
        return 0

    def dense(self) -> Tensor:
        """The tensor itself, multiplied out."""
        found = self.stack.matrices() if self.index is None else self.stack.matrices()[self.index]
        return found.mT if self.turned else found

    def __getitem__(self, index: Any) -> Any:
        if self.index is None:
            if isinstance(index, Tensor) and index.dim() == 0 and not index.is_floating_point():
                index = int(index)
            if isinstance(index, int):
                return ExpertWeights(self.stack, index % self.stack.experts, self.turned)
            if isinstance(index, Tensor) and index.dim() == 1 and index.dtype in (torch.int64, torch.int32):
                return ExpertWeights(self.stack, index.long(), self.turned)
        return self.dense()[index]

    def transpose(self, first: int, second: int) -> Any:
        """The operand with two of its axes exchanged."""
        axes = self.dim()
        if {first % axes, second % axes} == {axes - 1, axes - 2}:
            return self.mT
        return self.dense().transpose(first, second)

    @property
    def mT(self) -> ExpertWeights:  # noqa: N802  (torch's name)
        return ExpertWeights(self.stack, self.index, not self.turned)

    T = mT

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return _matmul(x, self)

    def __matmul__(self, x: Tensor) -> Tensor:
        return _matmul(self, x)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def times(self, x: Tensor) -> Tensor:
        """``x W_eᵀ``: rows (s, n), or (..., n) of one expert, or (E, t, n), t of every expert."""
        if isinstance(self.index, int):
            return self.stack.product(self.index, x)
        if x.dim() == 2:
            assert self.index is not None
            return self.stack.rows_by_expert(x, self.index)
        experts = range(self.stack.experts) if self.index is None else self.index.tolist()
        return torch.stack([self.stack.product(expert, part) for expert, part in zip(experts, x, strict=True)])

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = _HANDLERS.get(function, _unknown)(*args, **kwargs)
        if found is not None:
            return found
        given = [each.dense() if isinstance(each, ExpertWeights) else each for each in args]
        named = {key: v.dense() if isinstance(v, ExpertWeights) else v for key, v in kwargs.items()}
        return function(*given, **named)


# Each handler gives the result, or None where the matrices themselves have to take part.


def _unknown(*_: Any, **__: Any) -> None:
    return None


def _linear(input: Any, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    if not isinstance(weight, ExpertWeights) or weight.turned or not isinstance(weight.index, int):
        return None
    y = weight.times(input)
    return y if bias is None else y + bias


def _product(first: Any, second: Any, *_: Any, **__: Any) -> Tensor | None:
    """``x Wᵀ`` where the matrices stand behind, and ``W x`` where they stand in front."""
    if isinstance(second, ExpertWeights) and second.turned and isinstance(first, Tensor):
        return _of_rows(second, first)
    if isinstance(first, ExpertWeights) and not first.turned and isinstance(second, Tensor) and second.dim() > 1:
        y = _of_rows(first, second.mT)
        return None if y is None else y.mT
    return None


def _of_rows(weights: ExpertWeights, x: Tensor) -> Tensor | None:
    """Products with vectors (..., n) of one expert; (s, 1, n), a vector for each row; or (E, t, n)."""
    if isinstance(weights.index, int):
        return weights.times(x)
    if x.dim() != 3:
        return None
    if x.shape[1] == 1 and weights.index is not None:
        return weights.times(x.squeeze(1)).unsqueeze(1)
    return weights.times(x)


def _matmul(first: Any, second: Any) -> Tensor:
    found = _product(first, second)
    if found is not None:
        return found
    dense = (each.dense() if isinstance(each, ExpertWeights) else each for each in (first, second))
    return torch.matmul(*dense)


def _grouped(input: Any, weight: Any, offs: Any = None, *_: Any, **__: Any) -> Tensor | None:
    """Rows that are sorted by expert, ending where ``offs`` (E,) says."""
    whole = isinstance(weight, ExpertWeights) and weight.turned and weight.index is None
    if not whole or not isinstance(offs, Tensor) or input.dim() != 2:
        return None
    ends = offs.tolist()
    return weight.stack.grouped_rows(input, [end - start for start, end in zip([0, *ends], ends, strict=False)])  # type: ignore[no-any-return]


def _handlers() -> Iterator[tuple[Any, Callable[..., Tensor | None]]]:
    yield F.linear, _linear
    for product in (
        torch.matmul,
        torch.mm,
        torch.bmm,
        Tensor.matmul,
        Tensor.__matmul__,
        Tensor.__rmatmul__,
        Tensor.bmm,
    ):
        yield product, _product
    for place, name in ((F, "grouped_mm"), (torch, "_grouped_mm")):
        if hasattr(place, name):
            yield getattr(place, name), _grouped


_HANDLERS: Mapping[Any, Callable[..., Tensor | None]] = dict(_handlers())
