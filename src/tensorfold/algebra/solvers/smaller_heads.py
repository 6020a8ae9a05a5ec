"""Smaller value heads: attention keeps those dimensions of its values whose loss changes its output least.

Notation:
    whole, size     dimensions of a value head, and how many of them are kept
    h, k            a head, and the group of heads that share one value head
    x               input of the value projection, (in,)
    V_k             value projection of group k, (whole, in)
    z_h             a mean of V_k x over positions, (whole,)
    O_h             output projection of head h, (out, whole); attention gives Σ_h O_h z_h
    M               second moment of z_h, averaged over the heads of a group, (whole, whole)
    G               gradient moment at the output, (out, out)
    E               basis of what a group keeps, (size, whole), orthonormal rows

Any invertible R turns ``V_k`` to ``R V_k`` and its ``O_h`` to ``O_h R⁻¹`` and changes nothing. So a head need not keep
its own coordinates: ``V'_k = E V_k`` has fewer rows, and ``O'_h`` with ``O'_h E ≈ O_h`` as few columns. E spans the
leading eigenvectors of ``M^½ (Σ_h O_hᵀ G O_h) M^½``, mapped back by ``M^−½``. That is optimal if heads are independent
and the heads of a group have equal M. For this E the O' of all heads together are a regression, and optimal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorfold.algebra.solvers.low_rank import error_curve, roots

_RIDGE = 1e-6  # added to a second moment that is inverted, as a part of its mean diagonal
_EIGHTHS = range(3, 8)  # sizes of smaller heads, in eighths of the whole one


class Known(NamedTuple):
    """A matrix W (out, in) with its two moments.

    Attributes:
        weight: W.
        input_moment: C, (in, in), second moment of the vectors that W is applied to.
        gradient_moment: G, (out, out), second moment of the loss's gradient at the output of W.
    """

    weight: Tensor
    input_moment: Tensor
    gradient_moment: Tensor


@dataclass(frozen=True, eq=False)
class HeadBasis:
    """Bases that the smaller value heads of a block are given in.

    Attributes:
        into: E of every group, (groups, size, whole), with orthonormal rows.
        back: ``M Eᵀ (E M Eᵀ)⁻¹`` of every group, (groups, whole, size): ``back E z`` is the best estimate of z.
    """

    into: Tensor
    back: Tensor

    @property
    def size(self) -> int:
        """Dimensions that a head keeps."""
        return self.into.shape[1]

    def to(self, device: torch.device) -> HeadBasis:
        """The same on a device."""
        return HeadBasis(self.into.to(device), self.back.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        return {"into": self.into.clone(), "back": self.back.clone()}

    def rows(self, matrix: Tensor) -> Tensor:
        """``E W`` in every group of rows of W (groups · whole, …), padded with zero rows to the shape of W."""
        groups, size, whole = self.into.shape
        parts = matrix.reshape(groups, whole, -1)
        turned = F.pad(self.into.to(parts) @ parts, (0, 0, 0, whole - size))
        return turned.reshape(matrix.shape)

    def gradient_moment(self, moment: Tensor) -> Tensor:
        """Gradient moment at ``E W x`` from that at ``W x``: ``backᵀ G back`` in every pair of groups, zero-padded.

        Args:
            moment: G, (groups · whole, groups · whole); the result has its shape.
        """
        groups, size, whole = self.into.shape
        parts, back = moment.reshape(groups, whole, groups, whole), self.back.to(moment)
        turned = torch.einsum("gwa,gwhv,hvb->gahb", back, parts, back)
        turned = F.pad(turned, (0, whole - size, 0, 0, 0, whole - size))
        return turned.reshape(moment.shape)

    def columns(self, matrix: Tensor) -> Tensor:
        """``O_h back`` in every head of O (out, heads · whole), padded with zero columns to the shape of O."""
        groups, size, whole = self.into.shape
        parts = matrix.reshape(len(matrix), groups, -1, whole)
        turned = torch.einsum("ogjw,gwa->ogja", parts, self.back.to(matrix))
        return F.pad(turned, (0, whole - size)).reshape(matrix.shape)


class PairCurves(NamedTuple):
    """Squared errors of a block's value and output projection with smaller heads, at every rank.

    Attributes:
        basis: The smaller heads.
        values: ``‖G^½ (V' − V̂) C^½‖²`` of the best V̂ of rank 0, 1, …; (min(groups · size, in) + 1,).
        outputs: Likewise for O', plus what smaller heads alone lose; (min(out, heads · size) + 1,).
    """

    basis: HeadBasis
    values: Tensor
    outputs: Tensor


def shrunken_heads(values: Known, outputs: Known, heads: int) -> Iterator[PairCurves]:
    """Error curves of the value and output projection for heads of 3/8 … 7/8 of their size, smallest first.

    Args:
        values: V of all groups, (groups · whole, in).
        outputs: O of all heads, (out, heads · whole); ``heads / groups`` neighbouring heads share a group.
        heads: Number of heads.
    """
    w, c, g = (tensor.double() for tensor in outputs)
    whole = w.shape[1] // heads
    groups = len(values.weight) // whole
    shared = heads // groups
    parts = w.reshape(-1, heads, whole)
    # Σ_h O_hᵀ G O_h of every group, (groups, whole, whole).
    gains = torch.einsum("ohx,op,phy->hxy", parts, g, parts).reshape(groups, shared, whole, whole).sum(1)
    each = torch.arange(heads, device=c.device)
    # M of every group, (groups, whole, whole), from the diagonal blocks of C.
    moments = c.reshape(heads, whole, heads, whole)[each, :, each].reshape(groups, shared, whole, whole).mean(1)
    found = []
    for gain, moment in zip(gains, moments, strict=True):
        into, back = roots(moment, w)
        assert into is not None
        assert back is not None
        found.append((torch.linalg.eigh(into @ gain @ into).eigenvectors.flip(-1).T, back, moment))
    for size in sorted({whole * eighths // 8 for eighths in _EIGHTHS} - {0, whole}):
        bases = [torch.linalg.qr((vectors[:size] @ back).T).Q.T for vectors, back, _ in found]
        basis = HeadBasis(
            torch.stack(bases),
            torch.stack([_estimate(e, moment) for e, (_, _, moment) in zip(bases, found, strict=True)]),
        )
        curves = _curves(values, Known(w, c, g), basis, heads)
        yield PairCurves(HeadBasis(basis.into.float().cpu(), basis.back.float().cpu()), *curves)


def _estimate(into: Tensor, moment: Tensor) -> Tensor:
    """Best linear estimate of z from ``E z``: ``M Eᵀ (E M Eᵀ)⁻¹``, (whole, size)."""
    return _regression(into @ moment @ into.T, moment @ into.T)


def _regression(input_moment: Tensor, cross: Tensor) -> Tensor:
    """Least-squares coefficients ``E[y xᵀ] (E[x xᵀ] + ridge)⁻¹``, (m, n), from the cross moment (m, n)."""
    ridge = (_RIDGE * input_moment.diagonal().mean()).clamp_min(torch.finfo(input_moment.dtype).tiny)
    return torch.linalg.solve(input_moment + ridge * torch.eye(len(input_moment)).to(input_moment), cross.T).T


def _curves(values: Known, outputs: Known, basis: HeadBasis, heads: int) -> tuple[Tensor, Tensor]:
    """Error curves of V' and O' at every rank, the second with what smaller heads alone lose.

    Args:
        values: V with its moments.
        outputs: O with its moments, fp64.
        basis: The smaller heads.
        heads: Number of heads.
    """
    groups, size, whole = basis.into.shape
    w, c, g = outputs
    each = basis.into.repeat_interleave(heads // groups, 0)  # (heads, size, whole)
    crossed = torch.einsum("xhw,haw->xha", (w @ c).reshape(-1, heads, whole), each).flatten(1)  # O C Eᵀ
    inner = torch.einsum("haw,hwkv,kbv->hakb", each, c.reshape(heads, whole, heads, whole), each)
    inner = inner.reshape(heads * size, heads * size)  # E C Eᵀ, second moment of all E z_h
    best = _regression(inner, crossed)  # O', (out, heads·size)
    lost = (g * (w @ c @ w.T - best @ crossed.T)).sum().clamp_min(0)
    kept = basis.rows(values.weight.double()).reshape(groups, whole, -1)[:, :size].flatten(0, 1)
    reduced = basis.gradient_moment(values.gradient_moment.double()).reshape(groups, whole, groups, whole)
    reduced = reduced[:, :size, :, :size].reshape(groups * size, groups * size)
    return error_curve(kept, values.input_moment, reduced), error_curve(best, inner, g) + lost.cpu()
