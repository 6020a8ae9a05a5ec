"""Smaller value heads: in which basis a value head of attention keeps most, and what it and its outputs then lose.

The output of a block's attention is ``Σ_h O_h z_h``, with ``z_h`` a mean over positions of ``V_k x``, k the group of
query heads that h belongs to. Any invertible R turns ``V_k`` to ``R V_k`` and its ``O_h`` to ``O_h R⁻¹`` and changes
nothing. So a head need not keep its own coordinates: with E (size, whole), ``V'_k = E V_k`` has fewer rows, and
``O'_h E ≈ O_h`` as few columns. E spans what ``Σ_h O_hᵀ G O_h`` holds most of in the metric of z, which is the best for
heads that do not depend on each other and, where several share a group, have equal second moments; O' is then the best
there is for E, by regression of all heads at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorfold.algebra.allocation import Curve, from_floor
from tensorfold.algebra.solvers.low_rank import error_curve, roots

_RIDGE = 1e-6  # of its mean diagonal, added to a second moment that is inverted
_EIGHTHS = range(3, 8)  # of the whole head, as sizes of smaller ones


class Known(NamedTuple):
    """A matrix W (out, in) with C (in, in), second moment of its inputs, and G (out, out), of the loss's gradient."""

    weight: Tensor
    input_moment: Tensor
    gradient_moment: Tensor


@dataclass(frozen=True, eq=False)
class HeadBasis:
    """What the value heads of a block keep.

    Attributes:
        into: E of every group, (groups, size, whole), with orthonormal rows.
        back: (groups, whole, size): ``back E z`` is the best estimate of z.
    """

    into: Tensor
    back: Tensor

    @property
    def size(self) -> int:
        return self.into.shape[1]

    def rows(self, matrix: Tensor) -> Tensor:
        """``E W`` for W of shape (groups · whole, …), with zeros where heads have shrunk: of the same shape."""
        groups, size, whole = self.into.shape
        parts = matrix.reshape(groups, whole, -1)
        turned = F.pad(self.into.to(parts) @ parts, (0, 0, 0, whole - size))
        return turned.reshape(matrix.shape)

    def gradient_moment(self, moment: Tensor) -> Tensor:
        """Second moment of the gradient at ``E W x`` from that at ``W x``, (groups · whole, groups · whole)."""
        groups, size, whole = self.into.shape
        parts, back = moment.reshape(groups, whole, groups, whole), self.back.to(moment)
        turned = torch.einsum("gwa,gwhv,hvb->gahb", back, parts, back)
        turned = F.pad(turned, (0, whole - size, 0, 0, 0, whole - size))
        return turned.reshape(moment.shape)

    def columns(self, matrix: Tensor) -> Tensor:
        """``O_h back`` for O of shape (out, heads · whole), with zeros where heads have shrunk: of the same shape."""
        groups, size, whole = self.into.shape
        parts = matrix.reshape(len(matrix), groups, -1, whole)
        turned = torch.einsum("ogjw,gwa->ogja", parts, self.back.to(matrix))
        return F.pad(turned, (0, whole - size)).reshape(matrix.shape)


class PairCurves(NamedTuple):
    """Squared errors at every rank of values and outputs whose heads have shrunk, with what that itself lost."""

    basis: HeadBasis
    values: Tensor
    outputs: Tensor


def shrunken_heads(values: Known, outputs: Known, heads: int) -> Iterator[PairCurves]:
    """Values and outputs with heads of several smaller sizes.

    Args:
        values: W of shape (groups · whole, in).
        outputs: W of shape (out, heads · whole); ``heads / groups`` neighbouring heads share a group.
    """
    w, c, g = (tensor.double() for tensor in outputs)
    whole = w.shape[1] // heads
    groups = len(values.weight) // whole
    shared = heads // groups
    parts = w.reshape(-1, heads, whole)
    gains = torch.einsum("ohx,op,phy->hxy", parts, g, parts).reshape(groups, shared, whole, whole).sum(1)
    each = torch.arange(heads, device=c.device)
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
    """``M Eᵀ (E M Eᵀ)⁻¹``, (whole, size)."""
    return _regression(into @ moment @ into.T, moment @ into.T)


def _regression(input_moment: Tensor, cross: Tensor) -> Tensor:
    """``cross · inputs⁻¹``."""
    ridge = (_RIDGE * input_moment.diagonal().mean()).clamp_min(torch.finfo(input_moment.dtype).tiny)
    return torch.linalg.solve(input_moment + ridge * torch.eye(len(input_moment)).to(input_moment), cross.T).T


def _curves(values: Known, outputs: Known, basis: HeadBasis, heads: int) -> tuple[Tensor, Tensor]:
    groups, size, whole = basis.into.shape
    w, c, g = outputs
    each = basis.into.repeat_interleave(heads // groups, 0)  # (heads, size, whole)
    crossed = torch.einsum("xhw,haw->xha", (w @ c).reshape(-1, heads, whole), each).flatten(1)
    inner = torch.einsum("haw,hwkv,kbv->hakb", each, c.reshape(heads, whole, heads, whole), each)
    inner = inner.reshape(heads * size, heads * size)
    best = _regression(inner, crossed)
    lost = (g * (w @ c @ w.T - best @ crossed.T)).sum().clamp_min(0)
    kept = basis.rows(values.weight.double()).reshape(groups, whole, -1)[:, :size].flatten(0, 1)
    reduced = basis.gradient_moment(values.gradient_moment.double()).reshape(groups, whole, groups, whole)
    reduced = reduced[:, :size, :, :size].reshape(groups * size, groups * size)
    return error_curve(kept, values.input_moment, reduced), error_curve(best, inner, g) + lost.cpu()


class Sizes(NamedTuple):
    """What a pair is given: the size of its heads, the index on the curve of its values and that on its outputs'."""

    size: int
    values: int
    outputs: int


def joint_curve(by_size: Mapping[int, tuple[Curve, Curve]]) -> tuple[Curve, list[Sizes]]:
    """What values and outputs together lose at every cost, in the best division and size of heads.

    For one size the divisions that a price for parameters reaches are sums of points on the two lower convex hulls;
    the steps between them are those of one of the two.

    Args:
        by_size: Curves of values and outputs with heads of each size. Neither gets less than its floor, or than all
            that it can have with heads of that size.
    """
    points = []
    for size, (values, outputs) in by_size.items():
        for i, j in _divisions(values, outputs):
            cost, loss = values.costs[i] + outputs.costs[j], values.losses[i] + outputs.losses[j]
            points.append((float(cost), float(loss), Sizes(size, i, j)))
    points.sort()
    kept = points[:1]
    for point in points[1:]:
        if point[1] < kept[-1][1] and point[0] > kept[-1][0]:
            kept.append(point)
    costs, losses = (torch.tensor([point[k] for point in kept], dtype=torch.float64) for k in (0, 1))
    return Curve(losses, costs), [point[2] for point in kept]


def _divisions(one: Curve, other: Curve) -> Iterator[tuple[int, int]]:
    """Pairs of indices, from both floors on, each a step further on the one of the two whose hull gains more there."""
    curves = (one, other)
    hulls = [_hull(curve, from_floor(curve)) for curve in curves]
    reached, at = [hull[0] for hull in hulls], [0, 0]
    yield reached[0], reached[1]
    while True:
        best, gain = None, -1.0
        for k, curve in enumerate(curves):
            if at[k] + 1 < len(hulls[k]):
                here, there = hulls[k][at[k]], hulls[k][at[k] + 1]
                slope = float((curve.losses[here] - curve.losses[there]) / (curve.costs[there] - curve.costs[here]))
                if slope > gain:
                    best, gain = k, slope
        if best is None:
            return
        at[best] += 1
        for index in range(reached[best] + 1, hulls[best][at[best]] + 1):
            reached[best] = index
            yield reached[0], reached[1]


def _hull(curve: Curve, first: int) -> list[int]:
    """Indices on the lower convex hull of losses over costs, from ``first`` to the last one."""
    costs, losses = curve.costs.tolist(), curve.losses.tolist()
    kept = [first]
    for k in range(first + 1, len(costs)):
        while len(kept) > 1:
            a, b = kept[-2], kept[-1]
            if (losses[a] - losses[b]) * (costs[k] - costs[a]) > (losses[a] - losses[k]) * (costs[b] - costs[a]):
                break
            kept.pop()
        kept.append(k)
    return kept
