"""An embedding table in which frequent tokens have more numbers than rare ones, and the output head tied to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorfold.algebra.contraction.apply import add_bias
from tensorfold.algebra.precision import as_given, product_dtype
from tensorfold.algebra.solvers.graded import GradedSpec, graded_low_rank
from tensorfold.algebra.solvers.solve import Factors
from tensorfold.nn.base import FoldedModule, in_table, store
from tensorfold.nn.owners import Cores
from tensorfold.utils.validation import check_types


class GradedModule(FoldedModule):
    """One core a class of tokens, and the basis they share; embedding and head have them in common.

    Attributes:
        position: int64, shape (vocabulary,): the place of each token in the order of the classes. Stored with the
            weights, because nothing else says which token a row is.
    """

    position: Tensor

    def __init__(self, spec: GradedSpec, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        check_types(type(self).__name__, spec=(spec, GradedSpec))
        self.spec = spec
        self.cores = Cores(nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for shape in spec.core_shapes)
        self.scalars = None
        self.register_buffer("position", torch.arange(spec.vocabulary, device=device))

    def classes(self) -> Iterator[tuple[int, Tensor, bool]]:
        """For each class its first place, its core (tokens, rank), and whether that holds the rows themselves."""
        for start, rank, core in zip(self.spec.starts, self.spec.ranks, self.cores, strict=False):
            yield start, core, rank == self.spec.width

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The table, shape (vocabulary, width), multiplied out in ``dtype`` (the cores' own if None)."""
        dtype = dtype or self.cores[0].dtype
        basis = self.cores[-1].to(dtype)
        parts = [core.to(dtype) for _, core, _ in self.classes()]
        exact = [is_exact for *_, is_exact in self.classes()]
        with as_given(basis.device.type):
            rows = [part if e else part @ basis[: part.shape[1]] for part, e in zip(parts, exact, strict=True)]
        return torch.cat(rows)[self.position]

    @torch.no_grad()
    def load_factors(self, factors: Factors) -> None:
        """Copy a solver's output into parameters and order; the tokens' own order where it gives none."""
        for parameter, core in zip(self.cores, factors.cores, strict=True):
            store(parameter, core)
        order = factors.out_order
        self.position.copy_(torch.arange(self.spec.vocabulary) if order is None else order.argsort())


class GradedEmbedding(GradedModule):
    """Token index → row of the table ``E`` (vocabulary, width), of graded low rank: see ``algebra.graded``.

    Args:
        spec: Vocabulary, width and classes. Only shapes are needed, so it can be built on the meta device.
        scale: Constant factor on every row, as Gemma applies it.
    """

    def __init__(
        self, spec: GradedSpec, scale: float = 1.0, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(spec, device, dtype)
        self.num_embeddings, self.embedding_dim = spec.vocabulary, spec.width
        self.scale = scale
        self.reset_parameters()

    def reset_parameters(self, std: float = 1.0) -> None:
        """Random cores whose rows have entries of standard deviation ``std``."""
        for (_, core, exact), rank in zip(self.classes(), self.spec.ranks, strict=True):
            nn.init.normal_(core, std=std if exact else std / rank**0.5)
        if self.spec.basis:
            nn.init.normal_(self.cores[-1])

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        spec: GradedSpec,
        scale: float = 1.0,
        importance: Tensor | None = None,
        metric: Tensor | None = None,
    ) -> Self:
        """The nearest such table to ``weight``, shape (vocabulary, width); the rest as in ``graded_low_rank``.

        Raises:
            SpecError: A shape does not fit ``spec``, or a value is not finite.
        """
        check_types(cls.__name__, weight=(weight, Tensor), spec=(spec, GradedSpec))
        factors = graded_low_rank(weight.detach(), spec, importance, metric)
        table = cls(spec, scale, device="meta").to_empty(device=weight.device).to(weight.dtype)
        table.load_factors(factors)
        return table

    def forward(self, input: Tensor) -> Tensor:
        """Integers of shape ``(...)`` → ``(..., width)``.

        Raises:
            IndexError: One of them is not in the vocabulary, as ``nn.Embedding`` says it.
        """
        return self.cores(self._rows, input)

    def _rows(self, index: Tensor) -> Tensor:
        place = self.position[in_table(index.reshape(-1), self.num_embeddings)]
        rows: Tensor | None = None
        coefficients: Tensor | None = None
        # Every class is asked for every token, and gives zeros for those of others: shapes then depend on no value.
        for start, core, exact in self.classes():
            tokens, rank = core.shape
            inside = (place >= start) & (place < start + tokens)
            part = core[(place - start).clamp(0, tokens - 1)] * inside[:, None]
            if exact:
                rows = part
            else:
                part = F.pad(part, (0, self.spec.basis - rank))
                coefficients = part if coefficients is None else coefficients + part
        if coefficients is not None:
            with as_given(index.device.type):
                shared = coefficients @ self.cores[-1]
            rows = shared if rows is None else rows + shared
        assert rows is not None
        out = rows.reshape(*index.shape, self.embedding_dim)
        return out if self.scale == 1.0 else out * torch.tensor(self.scale, dtype=out.dtype, device=out.device)

    def head(self, bias: Tensor | None = None) -> GradedHead:
        """The tied output head ``h ↦ h Eᵀ + bias`` over these very parameters, not copies.

        The order is the table's, and is stored with it alone.
        """
        head = GradedHead(self.spec, bias is not None, device="meta")
        for k, core in enumerate(self.cores):
            head.cores[k] = core
        head.share_orders(self)
        if bias is not None:
            head.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return head

    def extra_repr(self) -> str:
        return f"{self.spec}, vocabulary={self.num_embeddings}, width={self.embedding_dim}"


class GradedHead(GradedModule):
    """``y = h Eᵀ + b`` with E of graded low rank, never built: ``spec.macs`` multiply–adds a token, plus the bias.

    Args:
        spec: Of the embedding it is tied to.
        bias: Whether there is a bias of shape (vocabulary,).
    """

    def __init__(
        self, spec: GradedSpec, bias: bool = False, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(spec, device, dtype)
        self.in_features, self.out_features = spec.width, spec.vocabulary
        self.bias = nn.Parameter(torch.zeros(spec.vocabulary, device=device, dtype=dtype)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        """Hidden states of shape ``(..., width)`` → logits ``(..., vocabulary)``."""
        return self.cores(self._outputs, input)

    def _outputs(self, x: Tensor) -> Tensor:
        if product_dtype(x) is torch.float16:
            with as_given(x.device.type):
                logits = self._logits(x.float(), [core.float() for core in self.cores]).half()
        else:
            logits = self._logits(x, list(self.cores))
        return logits if self.bias is None else add_bias(logits, self.bias)

    def _logits(self, x: Tensor, cores: list[Tensor]) -> Tensor:
        """Logits without the bias."""
        shared = F.linear(x, cores[-1]) if self.spec.basis else x  # (..., basis)
        parts = [
            F.linear(x if rank == self.spec.width else shared[..., :rank], core)
            for rank, core in zip(self.spec.ranks, cores, strict=False)
        ]
        return torch.cat(parts, dim=-1)[..., self.position]

    def extra_repr(self) -> str:
        return f"{self.spec}, in={self.in_features}, out={self.out_features}, bias={self.bias is not None}"
