"""An embedding table stored as a matrix product operator, and the output head tied to it."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from tensorfold.algebra.contraction.apply import rows
from tensorfold.algebra.precision import as_given
from tensorfold.algebra.solvers.solve import Factors, factorize
from tensorfold.algebra.specs.spec import Spec
from tensorfold.errors import SpecError
from tensorfold.nn.base import in_table
from tensorfold.nn.linear import MPOLinear, MPOModule
from tensorfold.utils.validation import check_types


class MPOEmbedding(MPOModule):
    """Token index → row of the table ``E`` (vocabulary, width), an MPO over (vocabulary, width).

    A lookup reads only the core slices of the tokens asked for. Kronecker tables (KnGPT2, arXiv 2110.08152), tensor
    trains (TT-Rec, arXiv 2101.11714) and low rank are all this module with different specs.

    Args:
        spec: ``out_features`` is the vocabulary, ``in_features`` the width.
        scale: Constant factor on every row, as Gemma applies it.
    """

    def __init__(self, spec: Spec, scale: float = 1.0, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(spec, device, dtype)
        if spec.is_partial:
            raise SpecError(
                f"MPOEmbedding: {spec} leaves rows or columns out; a table needs all, only linear layers may."
            )
        self.num_embeddings, self.embedding_dim = spec.out_features, spec.in_features
        self.scale = scale
        self.reset_parameters(1.0)

    @classmethod
    def from_dense(cls, weight: Tensor, spec: Spec, scale: float = 1.0, metric: Tensor | None = None) -> Self:
        """The closest MPO to the table ``weight``, shape (vocabulary, width); ``metric`` as in ``solve.factorize``.

        Raises:
            SpecError: A shape does not fit ``spec``, or a value is not finite.
        """
        check_types(cls.__name__, weight=(weight, Tensor), spec=(spec, Spec))
        return cls.from_factors(factorize(weight.detach(), spec, metric), spec, weight, scale)

    @classmethod
    def from_factors(cls, factors: Factors, spec: Spec, like: Tensor, scale: float = 1.0) -> Self:
        """An embedding holding a solver's output, on the device and in the dtype of ``like``."""
        table = cls(spec, scale, device="meta").to_empty(device=like.device).to(like.dtype)
        table.load_factors(factors)
        return table

    def forward(self, input: Tensor) -> Tensor:
        """Integers of shape ``(...)`` → ``(..., width)``.

        Raises:
            IndexError: One of them is not in the vocabulary, as ``nn.Embedding`` says it.
        """
        return self.cores(self._rows, input)

    def _rows(self, index: Tensor) -> Tensor:
        place = in_table(index.reshape(-1), self.num_embeddings)
        if self.out_position is not None:
            place = self.out_position[place]
        with as_given(index.device.type):
            out = rows(place, self.factors(), self.spec)
        out = out.reshape(*index.shape, self.embedding_dim).to(self.cores[0].dtype)
        if self.in_order is not None:
            out = out[..., self.in_order.argsort()]
        return out if self.scale == 1.0 else out * torch.tensor(self.scale, dtype=out.dtype, device=out.device)

    def head(self, bias: Tensor | None = None) -> MPOLinear:
        """The tied output head ``h ↦ h Eᵀ + bias``: a linear layer over these very parameters, not copies.

        Index orders are the table's, and are stored with it alone.
        """
        head = MPOLinear(self.spec, bias is not None, device="meta")
        for k, core in enumerate(self.cores):
            head.cores[k] = core
        head.scalars = self.scalars
        head.share_orders(self)
        if bias is not None:
            head.bias = bias if isinstance(bias, torch.nn.Parameter) else torch.nn.Parameter(bias)
        return head

    def extra_repr(self) -> str:
        return f"{self.spec}, vocabulary={self.num_embeddings}, width={self.embedding_dim}"
