"""An embedding table with one matrix product state a token, and the output head tied to it."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from tensorfold.algebra.contraction.apply import add_bias
from tensorfold.algebra.precision import as_given, autocasts, solvable
from tensorfold.algebra.solvers.solve import Factors
from tensorfold.algebra.solvers.token_mps import token_mps_svd
from tensorfold.algebra.specs.structure import Structure
from tensorfold.algebra.specs.token_mps import TokenMPSSpec
from tensorfold.errors import SpecError
from tensorfold.nn.structured import StructuredLinear, StructuredModule, StructuredTable
from tensorfold.utils.validation import check_types

# Most bytes of the table that a head holds at a time.
CHUNK_BYTES = 2**24


class TokenMPSModule(StructuredModule):
    """Cores of shape (vocabulary, left bond, mode, right bond); base of the embedding and its head."""

    structure: ClassVar[type[Structure]] = TokenMPSSpec

    _spec: TokenMPSSpec

    @property
    def spec(self) -> TokenMPSSpec:
        """Shape of the table at present: its vocabulary follows the cores, which can grow."""
        vocabulary = self.cores[0].shape[0]
        if vocabulary != self._spec.vocabulary:
            self.spec = self._spec.of_rows(vocabulary)
        return self._spec

    @spec.setter
    def spec(self, spec: TokenMPSSpec) -> None:
        _ = spec.split  # found once and kept, which torch.compile cannot do in a graph
        self._spec = spec


class TokenMPSEmbedding(TokenMPSModule, StructuredTable):
    """Token index → row of the table ``E`` (vocabulary, width), each row an MPS: TensorGPT, arXiv 2307.00526.

    A lookup reads the cores of the tokens asked for, ``spec.parameters_per_token`` numbers and ``spec.row_macs``
    multiply–adds each.

    Args:
        spec: Vocabulary, width, modes and rank. Only shapes are needed, so it can be built on the meta device.
        scale: Constant factor on every row, as Gemma applies it.
    """

    structure: ClassVar[type[Structure]] = TokenMPSSpec
    grows: ClassVar[bool] = True

    @property
    def num_embeddings(self) -> int:
        return self.cores[0].shape[0]

    @classmethod
    def from_dense(cls, weight: Tensor, spec: TokenMPSSpec, scale: float = 1.0) -> Self:
        """Decompose every row of a table by TT-SVD and make the module.

        Args:
            weight: Table, shape (vocabulary, width).
            spec: Vocabulary, width, modes and rank.
            scale: Constant factor on every row.

        Raises:
            SpecError: ``weight`` has another shape than ``spec``, or is not finite.
        """
        check_types(cls.__name__, weight=(weight, Tensor), spec=(spec, TokenMPSSpec))
        return cls.from_factors(Factors(token_mps_svd(solvable(weight.detach()), spec)), spec, weight, scale)

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
        shape = self._spec
        if not vectors.is_floating_point():
            raise SpecError(f"append: got vectors of {vectors.dtype}; needed floating-point numbers.")
        if vectors.dim() != 2 or vectors.shape[1] != shape.width or not len(vectors):
            raise SpecError(
                f"append: got vectors of shape {tuple(vectors.shape)}; needed (tokens, {shape.width}), one row for "
                "each new token."
            )
        new_tokens = shape.of_rows(vectors.shape[0])
        for k, (old, new) in enumerate(zip(self.cores, token_mps_svd(vectors.detach(), new_tokens), strict=True)):
            self.cores[k] = nn.Parameter(torch.cat([old, new.to(old)]), old.requires_grad)

    def head(self, bias: Tensor | None = None, chunk_bytes: int = CHUNK_BYTES) -> TokenMPSHead:
        """Output head ``h ↦ h Eᵀ + bias`` tied to the table E: it uses these very parameters, not copies.

        Args:
            bias: Shape (vocabulary,); None for no bias.
            chunk_bytes: Most bytes of the table that are held at a time.
        """
        head = TokenMPSHead(self.spec, bias is not None, chunk_bytes, device="meta")
        head.cores = self.cores  # the list itself, so that tokens appended here are the head's too
        if bias is not None:
            head.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return head


class TokenMPSHead(TokenMPSModule, StructuredLinear):
    """``y = h Eᵀ + b`` with every row of E an MPS: logits without the table.

    Rows are rebuilt a chunk at a time, forward and backward, so beside the logits and the cores (and their gradients)
    at most about one chunk is held. Under ``torch.compile`` and ``torch.export`` the chunks are ordinary operations,
    and a compiled training step may keep them all.

    Args:
        spec: Shape of the embedding that the head is tied to.
        bias: Whether there is a bias of shape (vocabulary,).
        chunk_bytes: Most bytes of the table that are held at a time.
    """

    structure: ClassVar[type[Structure]] = TokenMPSSpec
    ways: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        spec: TokenMPSSpec,
        bias: bool = False,
        chunk_bytes: int = CHUNK_BYTES,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(spec, bias, device, dtype)
        self.chunk_bytes = chunk_bytes

    @property
    def out_features(self) -> int:
        return self.cores[0].shape[0]

    def chunks(self) -> list[tuple[int, int]]:
        """Ranges of tokens whose rows, padded, take at most ``chunk_bytes``."""
        most = self.chunk_bytes // self.cores[0].element_size()
        return self._spec.chunks(self.cores[0].shape[0], most)

    def macs(self, tokens: int) -> float:
        """Multiply–adds a token: every row is rebuilt once in a forward, and read by every token."""
        return float(self.spec.vocabulary * (self.spec.row_macs / tokens + self.spec.width))

    def _outputs(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        if torch.compiler.is_compiling():
            logits = torch.cat([self._logits(flat, a, b) for a, b in self.chunks()], dim=-1)
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

    def rows(self, slices: list[Tensor]) -> Tensor:
        """Rows of some tokens, shape (tokens, width), from their slices (tokens, left bond, mode, right bond)."""
        with as_given(slices[0].device.type):
            return self._spec.of_slices(slices)


class _ChunkedLogits(torch.autograd.Function):
    """``x Eᵀ + b`` as an autograd function that rebuilds the rows of E chunk by chunk, once more for the gradients."""

    @staticmethod
    def forward(ctx: FunctionCtx, head: TokenMPSHead, x: Tensor, bias: Tensor | None, *cores: Tensor) -> Tensor:
        """Logits, shape (tokens, width) → (tokens, vocabulary)."""
        ctx.head = head  # type: ignore[attr-defined]
        ctx.save_for_backward(x, *cores)
        logits = x.new_empty(x.shape[0], cores[0].shape[0])
        with as_given(x.device.type):
            for a, b in head.chunks():
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
            for a, b in head.chunks():
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
