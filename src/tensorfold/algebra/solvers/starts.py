"""Starting cores that are no decomposition of the weight: Krony-PT's pruned weight, and random numbers."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from tensorfold.algebra.solvers.ttsvd import check_weight
from tensorfold.algebra.specs.spec import Spec
from tensorfold.errors import SpecError


def pruned(weight: Tensor, spec: Spec, epsilon: float = 0.0) -> list[Tensor]:
    """Krony-PT's pruning start: every other row of the weight ⊗ ``[1, ε]ᵀ``, or every other column ⊗ ``[1, ε]``.

    With ε = 0 the odd hidden units begin as zero; with ε they begin as faint copies of their neighbours.

    Args:
        weight: Shape (out_features, in_features).
        spec: One term, and one dimension halved: ``(out/2, in) ⊗ (2, 1)`` or ``(out, in/2) ⊗ (1, 2)``.
        epsilon: ε.

    Returns:
        Cores (1, out/2, in, 1) and (1, 2, 1, 1), or (1, out, in/2, 1) and (1, 1, 2, 1), in ``weight``'s dtype.

    Raises:
        SpecError: Another shape or more terms.
    """
    check_weight(weight, spec)
    check_prunable(spec)
    small = (spec.out_modes[-1], spec.in_modes[-1])
    kept = weight[::2] if small == (2, 1) else weight[:, ::2]
    copies = torch.tensor([1.0, epsilon], dtype=weight.dtype, device=weight.device)
    return [kept[None, :, :, None].contiguous(), copies.reshape(1, *small, 1)]


def check_prunable(spec: Spec) -> None:
    """Check that a spec has one term and halves one dimension, as :func:`pruned` needs.

    Raises:
        SpecError: It does not.
    """
    small = (spec.out_modes[-1], spec.in_modes[-1])
    if spec.sites != 2 or spec.ranks != (1,) or small not in ((2, 1), (1, 2)):
        raise SpecError(
            f"prune: {spec} does not halve one dimension; needed one term and a factor of half the rows or half the "
            f"columns, (m1, n1) = ({spec.out_features // 2}, {spec.in_features}) or "
            f"({spec.out_features}, {spec.in_features // 2})."
        )


def random_cores(weight: Tensor, spec: Spec, seed: int = 0) -> list[Tensor]:
    """Random normal cores, shapes ``spec.core_shapes``, whose matrix has about the mean square of the weight.

    Equal seeds and weights give equal cores. The seed is mixed with the weight's first row, so that equally shaped
    layers do not start equal.

    Args:
        weight: Shape (out_features, in_features); cores get its dtype and device.
        spec: Shape of the cores.
        seed: Any non-negative integer.
    """
    check_weight(weight, spec)
    mixed = zlib.crc32(weight[0].float().cpu().numpy().tobytes(), seed)
    generator = torch.Generator().manual_seed(mixed)
    mean_square = float(weight.float().square().mean())
    std = spec.core_std(math.sqrt(mean_square))
    return [torch.randn(shape, generator=generator).to(weight) * std for shape in spec.core_shapes]
