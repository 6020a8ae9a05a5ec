"""One matrix product state (MPS) a token: TensorGPT's embedding table.

    E[t, (j1 … jN)] = G1[t; j1] · G2[t; j2] · … · GN[t; jN]      core k: (vocabulary, r[k-1], mode_k, r[k])

Row ``t``, padded with zeros to ``j1 · … · jN`` numbers, is a tensor of order N and has its own TT-SVD. Tokens share
nothing: the work splits over any number of workers, and a new token needs one more small decomposition.
Sources: TensorGPT, arXiv 2307.00526; TensorSLM, arXiv 2506.13514; Oseledets, "Tensor-Train Decomposition" (2011).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorfold.errors import SpecError
from tensorfold.utils.validation import check_floating

_CHUNK = 2**21  # padded numbers decomposed at a time in fp64 (16 MB)


@dataclass(frozen=True)
class TokenMPSSpec:
    """Shape of a table in which every row is an MPS of its own; holds no weights.

    Args:
        vocabulary: Rows of the table.
        width: Columns of the table.
        modes: Mode of each site, in this order; their product is the padded width.
        rank: Cap on every bond; a bond is what its cut can have, where that is less.

    Raises:
        SpecError: Modes and width do not fit together, or no bond can be as large as ``rank``.

    >>> spec = TokenMPSSpec(vocabulary=50257, width=768, modes=(2,) * 10, rank=4)
    >>> spec.ranks, spec.parameters_per_token, round(spec.factor, 2)
    ((2, 4, 4, 4, 4, 4, 4, 4, 2), 232, 3.31)
    """

    vocabulary: int
    width: int
    modes: tuple[int, ...]
    rank: int

    # What other specs may have and this one never has.
    scalars: ClassVar[bool] = False
    reordered: ClassVar[tuple[str, ...]] = ()
    is_low_rank: ClassVar[bool] = False
    order_bytes: ClassVar[int] = 0

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "modes", tuple(self.modes))
        except TypeError:
            raise SpecError(f"TokenMPSSpec: modes={self.modes!r}; needed a sequence of positive integers.") from None
        for name, values in (
            ("vocabulary", (self.vocabulary,)),
            ("width", (self.width,)),
            ("modes", self.modes),
            ("rank", (self.rank,)),
        ):
            if not values or not all(type(value) is int and value > 0 for value in values):
                raise SpecError(f"TokenMPSSpec: {name}={getattr(self, name)!r}; needed positive integers.")
        if self.padded_width < self.width:
            raise SpecError(
                f"TokenMPSSpec: width={self.width} does not fit modes {self.modes}, whose product is "
                f"{self.padded_width}; give modes whose product is at least {self.width}."
            )
        if self.rank > self.largest_rank:
            raise SpecError(
                f"TokenMPSSpec: rank={self.rank} is more than any bond of modes {self.modes} can have; the largest "
                f"attainable is {self.largest_rank}, which is exact."
            )

    @classmethod
    def within(cls, vocabulary: int, width: int, modes: Sequence[int], keep: float) -> TokenMPSSpec:
        """The largest rank whose table has at most ``keep`` of the dense one's parameters.

        Raises:
            SpecError: Not even rank 1 has; the message names what it reaches.
        """
        best = smallest = cls(vocabulary, width, tuple(modes), 1)
        most = keep * width
        if smallest.parameters_per_token > most:
            raise SpecError(
                f"TokenMPSSpec: keep={keep} leaves {math.floor(most)} of {width} numbers a token, but rank 1 with "
                f"modes {smallest.modes} already takes {smallest.parameters_per_token}; keep at least "
                f"{math.ceil(1e4 / smallest.factor) / 1e4:.4f}, or give more and smaller modes."
            )
        for rank in range(2, smallest.largest_rank + 1):
            larger = replace(smallest, rank=rank)
            if larger.parameters_per_token > most:
                break
            best = larger
        return best

    @property
    def out_features(self) -> int:
        return self.vocabulary

    @property
    def in_features(self) -> int:
        return self.width

    @property
    def out_modes(self) -> tuple[int, ...]:
        """The token index, which is not split: every site reads the whole of it."""
        return (self.vocabulary,)

    @property
    def in_modes(self) -> tuple[int, ...]:
        return self.modes

    @property
    def sites(self) -> int:
        return len(self.modes)

    @property
    def padded_width(self) -> int:
        return math.prod(self.modes)

    @cached_property
    def _cuts(self) -> tuple[int, ...]:
        """The largest rank of each interior cut: the product of the modes on its smaller side."""
        left = list(itertools.accumulate(self.modes, lambda a, b: a * b))[:-1]
        return tuple(min(size, self.padded_width // size) for size in left)

    @property
    def largest_rank(self) -> int:
        return max(self._cuts, default=1)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Interior bonds, ``min(rank, left product, right product)``: the same for all tokens."""
        return tuple(min(self.rank, cut) for cut in self._cuts)

    @cached_property
    def core_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """Shape (vocabulary, left bond, mode, right bond) of every core."""
        bonds = (1, *self.ranks, 1)
        return tuple((self.vocabulary, bonds[k], mode, bonds[k + 1]) for k, mode in enumerate(self.modes))

    @property
    def parameters_per_token(self) -> int:
        return sum(left * mode * right for _, left, mode, right in self.core_shapes)

    @property
    def parameters(self) -> int:
        """Stored numbers, padding included."""
        return self.vocabulary * self.parameters_per_token

    @property
    def dense_parameters(self) -> int:
        return self.vocabulary * self.width

    @property
    def factor(self) -> float:
        """How many times fewer numbers are stored than in the dense table."""
        return self.width / self.parameters_per_token

    @property
    def attainable_matrix_rank(self) -> int:
        """Rows do not share factors, so nothing bounds the table's rank."""
        return min(self.vocabulary, self.width)

    @cached_property
    def split(self) -> int:
        """How many sites are multiplied up from the left, the rest from the right, before the two halves are joined."""
        return min(range(1, max(2, self.sites)), key=self._row_macs)

    def _row_macs(self, split: int) -> int:
        """Multiply–adds of one row, with the two halves joined after ``split`` sites."""
        if self.sites == 1:
            return 0
        bonds, modes = (1, *self.ranks, 1), self.modes
        left = sum(math.prod(modes[: k + 1]) * bonds[k] * bonds[k + 1] for k in range(1, split))
        right = sum(math.prod(modes[k:]) * bonds[k] * bonds[k + 1] for k in range(split, self.sites - 1))
        return left + right + self.padded_width * bonds[split]

    @property
    def row_macs(self) -> int:
        """Multiply–adds of looking up one token."""
        return self._row_macs(self.split)

    @property
    def macs(self) -> int:
        """Multiply–adds of the tied head for one hidden state: every row is rebuilt and read.

        Rows are rebuilt once for all hidden states of a call, so a longer input shares that part.
        """
        return self.vocabulary * (self.row_macs + self.width)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as stored in a checkpoint's configuration."""
        return {"vocabulary": self.vocabulary, "width": self.width, "modes": list(self.modes), "rank": self.rank}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TokenMPSSpec:
        """Inverse of :meth:`to_dict`.

        Raises:
            SpecError: A key is missing or unknown, or the values do not fit together.
        """
        known = {"vocabulary", "width", "modes", "rank"}
        if not isinstance(data, dict) or data.keys() != known:
            raise SpecError(f"TokenMPSSpec: got {data!r}; needed {', '.join(sorted(known))} and nothing else.")
        return cls(**data)

    def __str__(self) -> str:
        runs = [(mode, len(list(run))) for mode, run in itertools.groupby(self.modes)]
        modes = "·".join(f"{mode}^{count}" if count > 1 else str(mode) for mode, count in runs)
        return f"{self.vocabulary} × MPS({modes}, rank {self.rank})"


def powers_of_two(width: int) -> tuple[int, ...]:
    """As many twos as make up ``width`` or more: TensorGPT's modes, ten of them for 768.

    >>> len(powers_of_two(768)), len(powers_of_two(1024)), len(powers_of_two(1))
    (10, 10, 1)
    """
    return (2,) * max(1, (width - 1).bit_length())


def token_mps_svd(table: Tensor, spec: TokenMPSSpec) -> list[Tensor]:
    """Cores of the TT-SVD of every row by itself, within √(N−1) of the best approximation of each.

    Rows are worked on in chunks of bounded memory; a chunk's cores do not depend on the other rows, so any division of
    the table over processes gives these cores.

    Args:
        table: Shape (vocabulary, width), any floating dtype.

    Returns:
        Cores of shapes ``spec.core_shapes``, norms spread evenly over the bonds of each chain, in ``table``'s dtype if
        that is fp32 or fp64, else fp32.

    Raises:
        SpecError: ``table`` has another shape than ``spec``, or is not finite.
    """
    if tuple(table.shape) != (spec.vocabulary, spec.width):
        raise SpecError(f"table of shape {tuple(table.shape)}; the spec needs ({spec.vocabulary}, {spec.width}).")
    check_floating(table=table)
    result = table.dtype if table.dtype in (torch.float32, torch.float64) else torch.float32
    cores = [table.new_empty(shape, dtype=result) for shape in spec.core_shapes]
    chunk = max(1, _CHUNK // spec.padded_width)
    for start in range(0, spec.vocabulary, chunk):
        part = table[start : start + chunk].double()
        if not torch.isfinite(part).all():
            raise SpecError("table holds NaN or infinity; repair the checkpoint, or exclude this module.")
        for core, solved in zip(cores, _decompose(part, spec), strict=True):
            core[start : start + chunk] = solved
    return cores


def _decompose(table: Tensor, spec: TokenMPSSpec) -> list[Tensor]:
    """TT-SVD of some rows, left to right.

    Bonds that their cut makes full rank truncate nothing, so there any basis will do, and the identity costs nothing.
    """
    tokens = table.shape[0]
    rest = F.pad(table, (0, spec.padded_width - spec.width))
    cores = []
    for _, left, mode, right in spec.core_shapes[:-1]:
        rest = rest.reshape(tokens, left * mode, rest.numel() // (tokens * left * mode))
        rows, columns = rest.shape[1:]
        if right == rows:
            basis = _identity(rest, rows)
        elif right == columns:
            basis, rest = rest, _identity(rest, columns)
        else:
            basis = _left_basis(rest, right)
            rest = basis.mT @ rest
        cores.append(basis.reshape(tokens, left, mode, right))
    _, left, mode, _ = spec.core_shapes[-1]
    cores.append(rest.reshape(tokens, left, mode, 1))
    return _balance(cores)


def _identity(like: Tensor, size: int) -> Tensor:
    """Shape (tokens, size, size)."""
    return torch.eye(size, dtype=like.dtype, device=like.device).expand(like.shape[0], size, size)


def _left_basis(matrices: Tensor, rank: int) -> Tensor:
    """The ``rank`` leading left singular vectors of each matrix, signs fixed; (tokens, rows, cols) → (…, rows, rank).

    Eigenvectors of the smaller Gram matrix, in fp64: at most a few times the bond on a side, so a batch of them is
    cheap.
    """
    if matrices.shape[1] <= matrices.shape[2]:
        basis = _leading_eigenvectors(matrices @ matrices.mT, rank)
    else:
        basis = torch.linalg.qr(matrices @ _leading_eigenvectors(matrices.mT @ matrices, rank)).Q
    peak = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    return torch.where(peak < 0, -basis, basis)


def _leading_eigenvectors(symmetric: Tensor, count: int) -> Tensor:
    return torch.linalg.eigh(symmetric).eigenvectors[..., -count:].flip(-1)


def _balance(cores: Sequence[Tensor]) -> list[Tensor]:
    """The same chains, each with its norm spread evenly over bonds and cores, as ``ttsvd.balance`` does for one."""
    out = list(cores)
    for k in range(len(out) - 1):
        left = torch.linalg.vector_norm(out[k], dim=(1, 2))  # (tokens, r)
        right = torch.linalg.vector_norm(out[k + 1], dim=(2, 3))  # (tokens, r)
        alive = (left > 0) & (right > 0)
        scale = torch.where(alive, (right / left.where(alive, torch.ones_like(left))).sqrt(), torch.ones_like(left))
        out[k] = out[k] * scale[:, None, None, :]
        out[k + 1] = out[k + 1] / scale[:, :, None, None]
    norms = torch.stack([torch.linalg.vector_norm(core, dim=(1, 2, 3)) for core in out])  # (sites, tokens)
    alive = (norms > 0).all(0)
    norms = norms.where(alive, torch.ones_like(norms))
    scale = norms.log().mean(0).exp() / norms
    return [core * scale[k][:, None, None, None] for k, core in enumerate(out)]


def rows(cores: Sequence[Tensor], split: int) -> Tensor:
    """The padded rows that some tokens' cores stand for.

    Args:
        cores: One tensor a site, shapes (tokens, left bond, mode, right bond).
        split: ``spec.split``: half of the chain is multiplied up from each end, so that no long vector is carried
            through many bonds.

    Returns:
        Shape (tokens, product of the modes).
    """
    tokens = cores[0].shape[0]
    left = cores[0].flatten(1, 2)  # (tokens, J, r)
    for core in cores[1:split]:
        _, r, m, s = core.shape
        left = (left @ core.reshape(tokens, r, m * s)).reshape(tokens, left.shape[1] * m, s)
    if len(cores) == 1:
        return left.squeeze(2)
    right = cores[-1].squeeze(3)  # (tokens, r, K)
    for core in reversed(cores[split:-1]):
        _, r, m, s = core.shape
        right = (core.reshape(tokens, r * m, s) @ right).reshape(tokens, r, m * right.shape[2])
    return (left @ right).flatten(1)
