"""Modules with int8 weights: dense layers, embedding tables, and the cores of folded modules.

    w ≈ scale · code        code in −127 … 127, scale = max |w| / 127 over the numbers that share it

A scale belongs to an output row of a dense matrix, to a row of a table, and in a core (left bond, out mode, in mode,
right bond) to each pair of left bond and out mode; so no weight is off by more than half its scale, except in two
factors of low rank, which are rounded together so that their product is off by less. Biases, bond scalars, norms, and
cores whose scales would be too many (fewer than four numbers to one) stay as they are.

Weights are for inference only. They take a quarter of the memory of float32, and are turned back into floating point in
every forward that uses them, one module at a time, which costs time: int8 is for size, and slower than float32 where
few tokens are computed at once. torch's own product with int8 weights on the processor, ``_weight_int8pack_mm``, is
private, and crashed on small bf16 matrices in torch 2.13; it is not used.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorfold.algebra.precision import as_given, product_dtype
from tensorfold.algebra.solvers.rounding import Grid
from tensorfold.nn.base import FoldedModule, FoldedTable, StoresOrders, in_table
from tensorfold.nn.owners import Codes
from tensorfold.nn.rounded import rounded_cores
from tensorfold.utils.validation import check_floating

_LARGEST = 127
_SHARE = 4  # fewest numbers that share a scale; part of the format, so it depends on shapes alone


def quantize_rows(weight: Tensor, lead: int = 1) -> tuple[Tensor, Tensor]:
    """Quantise a weight to int8 with one scale for all numbers behind its leading axes.

    Args:
        weight: Any shape, floating dtype.
        lead: Number of leading axes that scales are given for.

    Returns:
        Codes, int8, of the weight's shape; and scales in its dtype, of the shape of its leading axes, then ones.
    """
    if not weight.is_meta:
        check_floating(weight=weight)
    values = weight.detach().float()
    peak = values.abs().amax(tuple(range(lead, weight.dim())), keepdim=True)
    # Rounded to the dtype it is stored in before it is used, so that nothing is lost by storing it.
    scale = torch.where(peak > 0, peak / _LARGEST, torch.ones_like(peak)).to(weight.dtype)
    # The smallest numbers of a dtype are far apart: where the scale was rounded down so much that the largest code
    # would not reach the peak, the next one above it.
    step = torch.finfo(scale.dtype).smallest_normal * torch.finfo(scale.dtype).eps
    short = scale.float() * (_LARGEST + 0.5) < peak
    scale = torch.where(short, (scale.float() + step).to(scale.dtype), scale)
    codes = (values / scale.float()).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
    return codes, scale


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Weights ``scale · code`` from codes and scales that broadcast, in ``dtype`` (the scales' own if None)."""
    dtype = dtype or scale.dtype
    return codes.to(dtype) * scale.to(dtype)


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Product ``x Wᵀ + b`` with an int8 weight, in the dtype of ``x``.

    Args:
        x: Shape (..., in).
        codes: int8, shape (out, in).
        scale: Shape (out,).
        bias: Shape (out,), or None.

    Returns:
        Shape (..., out).
    """
    # The weights are scaled, not the outputs: sums over bare codes are 127 / max |w| times as large as the outputs.
    weight = codes.to(x.dtype).mul_(scale.to(x.dtype)[:, None])
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _frozen(tensor: Tensor) -> nn.Parameter:
    """Parameter without gradient from a tensor; a parameter stays the object that it is, since it may be tied."""
    parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
    parameter.requires_grad_(False)
    return parameter


class Int8Linear(nn.Module):
    """A dense linear layer ``y = x Wᵀ + b`` whose weight is int8.

    Args:
        codes: int8, shape (out, in).
        scale: Shape (out,).
        bias: Shape (out,), or None.
    """

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.codes, self.scale = _frozen(codes), _frozen(scale)
        self.bias = None if bias is None else _frozen(bias)

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None) -> Self:
        """Quantise a weight (out, in), one scale a row, and make the layer with its bias (out,)."""
        codes, scale = quantize_rows(weight)
        return cls(codes, scale[:, 0], bias)

    def forward(self, input: Tensor) -> Tensor:
        """Shape ``(..., in_features)`` → ``(..., out_features)``."""
        return int8_linear(input, self.codes, self.scale, self.bias)

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Weight, shape (out_features, in_features), in ``dtype`` (the scales' own if None)."""
        return dequantize(self.codes, self.scale[:, None], dtype)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, bias={self.bias is not None}"


class Int8Embedding(nn.Module):
    """An embedding table whose rows are int8. A lookup reads the rows asked for.

    Args:
        codes: int8, shape (vocabulary, width).
        scale: Shape (vocabulary,).
        constant: Factor on every row, as Gemma applies it.
    """

    def __init__(self, codes: Tensor, scale: Tensor, constant: float = 1.0) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = codes.shape
        self.constant = constant
        self.codes, self.scale = _frozen(codes), _frozen(scale)

    @classmethod
    def from_dense(cls, weight: Tensor, constant: float = 1.0) -> Self:
        """Quantise a table (vocabulary, width), one scale a row, and make the module."""
        codes, scale = quantize_rows(weight)
        return cls(codes, scale[:, 0], constant)

    def forward(self, input: Tensor) -> Tensor:
        """Integers of shape ``(...)`` → ``(..., width)``.

        Raises:
            IndexError: One of them is not in the vocabulary, as ``nn.Embedding`` says it.
        """
        flat = in_table(input.reshape(-1), self.num_embeddings)
        rows = dequantize(self.codes[flat], self.scale[flat][:, None])
        return _scaled(rows.reshape(*input.shape, self.embedding_dim), self.constant)

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Table, shape (vocabulary, width), in ``dtype`` (the scales' own if None)."""
        return dequantize(self.codes, self.scale[:, None], dtype)

    def head(self, bias: Tensor | None = None) -> Int8Linear:
        """Output head tied to the table: it uses these very parameters, not copies."""
        return Int8Linear(self.codes, self.scale, bias)

    def extra_repr(self) -> str:
        return f"vocabulary={self.num_embeddings}, width={self.embedding_dim}"


class Int8Folded(StoresOrders):
    """A folded layer, embedding or head whose large cores are int8.

    Low rank is two int8 products. A ``TokenMPS`` table turns only the tokens asked for back into floating point.
    Everything else turns its cores back in every forward, and then computes as the folded module does.

    Args:
        folded: Folded module; its tensors are taken over, or made into codes.
        shared: Table that this is the tied head of, whose parameters it then uses.
    """

    def __init__(self, folded: FoldedModule, shared: Int8Folded | None = None) -> None:
        super().__init__()
        lead = folded.spec.shared_axes
        self.codes, self.scales, self.others = Codes(), Codes(), Codes()
        together = dict(zip(("cores.0", "cores.1"), rounded_cores(folded, Grid(_LARGEST)), strict=False))
        for name, own in folded.named_parameters():
            key, tensor = name.replace(".", "_"), together.get(name, own)
            if shared is not None and key in shared.codes:
                self.codes[key], self.scales[key] = shared.codes[key], shared.scales[key]
            elif shared is not None and key in shared.others:
                self.others[key] = shared.others[key]
            elif name.startswith("cores.") and tensor.numel() >= _SHARE * math.prod(tensor.shape[:lead]):
                codes, scale = quantize_rows(tensor, lead)
                self.codes[key], self.scales[key] = _frozen(codes), _frozen(scale)
            else:
                self.others[key] = _frozen(own)
        for name, buffer in folded.named_buffers():
            self.register_buffer(name, buffer, persistent=name not in folded._non_persistent_buffers_set)
        # What computes, without numbers of its own; in a list, so that it is no submodule.
        self._folded = [copy.deepcopy(folded).to("meta")]
        self._names = {name.replace(".", "_"): name for name, _ in folded.named_parameters()}

    @property
    def spec(self) -> Any:
        """Structure of the matrix."""
        return self._folded[0].spec

    def _replicate_for_data_parallel(self) -> Self:
        replica = super()._replicate_for_data_parallel()
        replica._folded = copy.deepcopy(self._folded)  # replicas compute at the same time, in threads
        return replica

    @property
    def num_embeddings(self) -> int:
        """Rows of a table."""
        return int(self.spec.out_features)

    @property
    def embedding_dim(self) -> int:
        """Columns of a table."""
        return int(self.spec.in_features)

    def tensors(self, dtype: torch.dtype | None = None) -> Mapping[str, Tensor]:
        """Parameters and buffers of the folded module by name, in floating point: ``dtype``, or the scales' own."""
        found: dict[str, Tensor] = dict(self.named_buffers(recurse=False))
        for key, name in self._names.items():
            if key in self.codes:
                found[name] = dequantize(self.codes[key], self.scales[key], dtype)
            else:
                found[name] = self.others[key]
        return found

    def forward(self, input: Tensor) -> Tensor:
        """Output of the folded module for this input, from its int8 cores."""
        return self.codes(lambda: self.scales(lambda: self.others(self._outputs, input)))

    def _outputs(self, x: Tensor) -> Tensor:
        folded = self._folded[0]
        if isinstance(folded, FoldedTable) and folded.spec.reads_slices:
            flat = in_table(x.reshape(-1), folded.spec.out_features)
            with as_given(x.device.type):
                rows = folded.spec.of_slices([self._slices(f"cores_{k}", flat) for k in range(len(folded.cores))])
            return _scaled(rows.reshape(*x.shape, folded.embedding_dim), folded.scale)
        pair = self._low_rank()
        if pair is not None:
            (left, left_scale), (right, right_scale) = pair
            bias = self.others.get("bias", None)
            if product_dtype(x) is not torch.float16:
                return int8_linear(int8_linear(x, right, right_scale), left, left_scale, bias)
            with as_given(x.device.type):
                return int8_linear(int8_linear(x.float(), right, right_scale), left, left_scale, bias).half()
        return torch.func.functional_call(folded, dict(self.tensors()), (x,))

    def _slices(self, key: str, index: Tensor) -> Tensor:
        if key in self.codes:
            return dequantize(self.codes[key][index], self.scales[key][index])
        return self.others[key][index]

    def _low_rank(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
        """Codes and scales of U (out, r) and V (r, in), where the matrix is U V and nothing else; None elsewhere."""
        folded = self._folded[0]
        spec = folded.spec
        if isinstance(folded, FoldedTable) or not spec.is_chain or set(self.codes) != {"cores_0", "cores_1"}:
            return None
        ends = ((1, spec.out_features, 1), (1, spec.in_features, 1))
        shapes = [self.codes[f"cores_{k}"].shape for k in range(2)]
        plain = folded.scalars is None and not spec.reordered
        if not plain or (tuple(shapes[0][:3]), tuple(shapes[1][1:])) != ends:
            return None
        left, right = self.codes["cores_0"], self.codes["cores_1"]
        return (
            (left[0, :, 0], self.scales["cores_0"].reshape(-1)),
            (right[:, 0, :, 0], self.scales["cores_1"].reshape(-1)),
        )

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Matrix, shape (out_features, in_features), multiplied out in ``dtype`` (the scales' own if None)."""
        tensors = {name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in self.tensors().items()}
        folded = copy.deepcopy(self._folded[0])
        folded.load_state_dict(tensors, assign=True)
        return folded.to_dense(dtype)

    def extra_repr(self) -> str:
        return f"{type(self._folded[0]).__name__}, {self.spec}"


def _scaled(rows: Tensor, constant: float) -> Tensor:
    return rows if constant == 1.0 else rows * torch.tensor(constant, dtype=rows.dtype, device=rows.device)
