"""An embedding table with one matrix product state a token, and the output head tied to it."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from tensorfold.algebra.contraction.apply import add_bias
from tensorfold.algebra.precision import as_given, autocasts, wide
from tensorfold.algebra.solvers.solve import Factors
from tensorfold.algebra.solvers.token_mps import TokenMPSSpec, rows, token_mps_svd
from tensorfold.errors import SpecError
from tensorfold.nn.base import FoldedModule, in_table, store
from tensorfold.nn.owners import Cores
from tensorfold.utils.validation import check_types

# Bytes of the table that a head holds at a time.
CHUNK_BYTES = 2**24


class TokenMPSModule(FoldedModule):
    """Cores of shape (vocabulary, left bond, mode, right bond), which embedding and head share."""

    def __init__(self, spec: TokenMPSSpec, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        check_types(type(self).__name__, spec=(spec, TokenMPSSpec))
        self._shape = spec
        self.cores = Cores(nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for shape in spec.core_shapes)
        self.scalars = None
        self._split = spec.split

    @property
    def spec(self) -> TokenMPSSpec:
        """The table's shape now; its vocabulary is that of the cores, which can grow."""
        shape = self._shape
        return TokenMPSSpec(self.cores[0].shape[0], shape.width, shape.modes, shape.rank)

    def rows(self, cores: list[Tensor]) -> Tensor:
        """Some tokens' core slices → their rows, shape (tokens, width)."""
        dtype = cores[0].dtype
        with as_given(cores[0].device.type):
            return rows([core.to(wide(dtype)) for core in cores], self._split)[:, : self._shape.width].to(dtype)

    def chunks(self, chunk_bytes: int) -> list[tuple[int, int]]:
        """Ranges of tokens whose rows, padded, take at most ``chunk_bytes``."""
        vocabulary = self.cores[0].shape[0]
        size = max(1, chunk_bytes // (self._shape.padded_width * self.cores[0].element_size()))
        return [(start, min(start + size, vocabulary)) for start in range(0, vocabulary, size)]

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The table, shape (vocabulary, width), multiplied out in ``dtype`` (the cores' own if None)."""
        dtype = dtype or self.cores[0].dtype
        parts = [[core[a:b].to(dtype) for core in self.cores] for a, b in self.chunks(CHUNK_BYTES)]
        return torch.cat([self.rows(part) for part in parts])

    @torch.no_grad()
    def load_factors(self, factors: Factors) -> None:
        """Copy a solver's output into the parameters."""
        for parameter, core in zip(self.cores, factors.cores, strict=True):
            store(parameter, core)


class TokenMPSEmbedding(TokenMPSModule):
    """Token index → row of the table ``E`` (vocabulary, width), each row an MPS: TensorGPT, arXiv 2307.00526.

    A lookup reads the cores of the tokens asked for, ``spec.parameters_per_token`` numbers and ``spec.row_macs``
    multiply–adds each.

    Args:
        spec: Vocabulary, width, modes and rank. Only shapes are needed, so it can be built on the meta device.
        scale: Constant factor on every row, as Gemma applies it.
    """

    def __init__(
        self, spec: TokenMPSSpec, scale: float = 1.0, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(spec, device, dtype)
        self.embedding_dim = spec.width
        self.scale = scale
        self.reset_parameters()

    @property
    def num_embeddings(self) -> int:
        return self.cores[0].shape[0]

    def reset_parameters(self, std: float = 1.0) -> None:
        """Random cores whose rows have entries of standard deviation ``std``: ``σ = (std² / Π r)^(1/2N)`` a core."""
        shape = self._shape
        for core in self.cores:
            nn.init.normal_(core, std=(std**2 / math.prod(shape.ranks)) ** (1 / (2 * shape.sites)))

    @classmethod
    def from_dense(cls, weight: Tensor, spec: TokenMPSSpec, scale: float = 1.0) -> Self:
        """The TT-SVD of every row of ``weight``, shape (vocabulary, width).

        Raises:
            SpecError: ``weight`` has another shape than ``spec``, or is not finite.
        """
        check_types(cls.__name__, weight=(weight, Tensor), spec=(spec, TokenMPSSpec))
        cores = token_mps_svd(weight.detach(), spec)
        table = cls(spec, scale, device="meta").to_empty(device=weight.device).to(weight.dtype)
        table.load_factors(Factors(cores))
        return table

    def forward(self, input: Tensor) -> Tensor:
        """Integers of shape ``(...)`` → ``(..., width)``.

        Raises:
            IndexError: One of them is not in the vocabulary, as ``nn.Embedding`` says it.
        """
        return self.cores(self._rows, input)

    def _rows(self, index: Tensor) -> Tensor:
        flat = in_table(index.reshape(-1), self.num_embeddings)
        out = self.rows([core.index_select(0, flat) for core in self.cores])
        out = out.reshape(*index.shape, self.embedding_dim)
        return out if self.scale == 1.0 else out * torch.tensor(self.scale, dtype=out.dtype, device=out.device)

    @torch.no_grad()
    def append(self, vectors: Tensor) -> None:
        """Add tokens: their rows are decomposed by themselves, the others stay as they are, bit for bit.

        A tied head grows along, but for its bias. The parameters are new objects: make optimizers anew. In a model call
        :func:`tensorfold.append_tokens` instead, which also sees to biases, an untied head and the configuration.

        Args:
            vectors: Shape (new tokens, width), as the dense table would hold them (before ``scale``).

        Raises:
            SpecError: ``vectors`` has another shape, or is not finite.
        """
        shape = self._shape
        if not vectors.is_floating_point():
            raise SpecError(f"append: got vectors of {vectors.dtype}; needed floating-point numbers.")
        if vectors.dim() != 2 or vectors.shape[1] != shape.width or not len(vectors):
            raise SpecError(
                f"append: got vectors of shape {tuple(vectors.shape)}; needed (tokens, {shape.width}), one row for "
                "each new token."
            )
        new_tokens = TokenMPSSpec(vectors.shape[0], shape.width, shape.modes, shape.rank)
        for k, (old, new) in enumerate(zip(self.cores, token_mps_svd(vectors.detach(), new_tokens), strict=True)):
            self.cores[k] = nn.Parameter(torch.cat([old, new.to(old)]), old.requires_grad)

    def head(self, bias: Tensor | None = None, chunk_bytes: int = CHUNK_BYTES) -> TokenMPSHead:
        """The tied output head ``h ↦ h Eᵀ + bias`` over these very parameters, not copies."""
        head = TokenMPSHead(self.spec, bias is not None, chunk_bytes, device="meta")
        head.cores = self.cores  # the list itself, so that tokens appended here are the head's too
        if bias is not None:
            head.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return head

    def extra_repr(self) -> str:
        return f"{self.spec}, vocabulary={self.num_embeddings}, width={self.embedding_dim}"


class TokenMPSHead(TokenMPSModule):
    """``y = h Eᵀ + b`` with every row of E an MPS: logits without the table.

    Rows are rebuilt a chunk at a time, forward and backward, so beside the logits and the cores (and their gradients)
    at most about one chunk is held. Under ``torch.compile`` and ``torch.export`` the chunks are ordinary operations,
    and a compiled training step may keep them all.

    Args:
        spec: Of the embedding it is tied to.
        bias: Whether there is a bias of shape (vocabulary,).
        chunk_bytes: Bytes of the table that are held at a time.
    """

    def __init__(
        self,
        spec: TokenMPSSpec,
        bias: bool = False,
        chunk_bytes: int = CHUNK_BYTES,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(spec, device, dtype)
        self.in_features = spec.width
        self.chunk_bytes = chunk_bytes
        self.bias = nn.Parameter(torch.zeros(spec.vocabulary, device=device, dtype=dtype)) if bias else None

    @property
    def out_features(self) -> int:
        return self.cores[0].shape[0]

    def forward(self, input: Tensor) -> Tensor:
        """Hidden states of shape ``(..., width)`` → logits ``(..., vocabulary)``."""
        return self.cores(self._outputs, input)

    def _outputs(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        if torch.compiler.is_compiling():
            logits = torch.cat([self._logits(flat, a, b) for a, b in self.chunks(self.chunk_bytes)], dim=-1)
            logits = logits if self.bias is None else add_bias(logits, self.bias)
        else:
            kind = x.device.type
            # Inside the function everything has the type it is given, so autocast's choice is made here.
            dtype = torch.get_autocast_dtype(kind) if autocasts(kind) else x.dtype
            bias = None if self.bias is None else self.bias.to(dtype)
            logits = _ChunkedLogits.apply(self, flat.to(dtype), bias, *self.cores)
        return logits.reshape(*x.shape[:-1], logits.shape[-1])

    def _logits(self, x: Tensor, start: int, stop: int) -> Tensor:
        return F.linear(x, self.rows([core[start:stop] for core in self.cores]))

    def extra_repr(self) -> str:
        return f"{self.spec}, in={self.in_features}, out={self.out_features}, bias={self.bias is not None}"


class _ChunkedLogits(torch.autograd.Function):
    """``x Eᵀ + b`` with the rows of E rebuilt chunk by chunk, and once more for the gradients."""

    @staticmethod
    def forward(ctx: FunctionCtx, head: TokenMPSHead, x: Tensor, bias: Tensor | None, *cores: Tensor) -> Tensor:
        """Shape (tokens, width) → (tokens, vocabulary)."""
        ctx.head = head  # type: ignore[attr-defined]
        ctx.save_for_backward(x, *cores)
        logits = x.new_empty(x.shape[0], cores[0].shape[0])
        with as_given(x.device.type):
            for a, b in head.chunks(head.chunk_bytes):
                table = head.rows([core[a:b] for core in cores]).to(x.dtype)
                torch.mm(x, table.T, out=logits[:, a:b])
        return logits if bias is None else logits.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        head, (x, *cores) = ctx.head, ctx.saved_tensors
        _, wants_x, wants_bias, *wanted = ctx.needs_input_grad
        wants_cores = any(wanted)
        # Summed over the chunks in fp32 at least.
        grad_x = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) if wants_x else None
        grad_cores = [torch.empty_like(core) for core in cores] if wants_cores else []
        with as_given(x.device.type):
            for a, b in head.chunks(head.chunk_bytes):
                parts = [core[a:b].detach().requires_grad_(wants_cores) for core in cores]
                with torch.set_grad_enabled(wants_cores):
                    table = head.rows(parts)
                if grad_x is not None:
                    grad_x += grad[:, a:b] @ table.detach().to(x.dtype)
                if wants_cores:
                    of_table = (grad[:, a:b].T @ x).to(table.dtype)
                    for whole, part in zip(grad_cores, torch.autograd.grad(table, parts, of_table), strict=True):
                        whole[a:b] = part
        grad_bias = grad.sum(0) if wants_bias else None
        of_cores: list[Tensor] | list[None] = grad_cores if wants_cores else [None] * len(cores)
        return None, None if grad_x is None else grad_x.to(x.dtype), grad_bias, *of_cores
