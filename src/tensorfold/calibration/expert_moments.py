"""Input moments of experts, shrunk towards what their layer says the more, the fewer tokens an expert was sent.

Notation:
    C_e     input moment of expert e, the mean of x xᵀ over the t_e vectors that it was given, (n, n)
    T_e     what C_e is shrunk towards
    α_e     how far, 0 … 1

A mean over t vectors is off by ``E ‖Ĉ − C‖² = ((tr C)² + ‖C‖²) / t`` where they are normally distributed, so that the
mixture ``(1 − α) Ĉ + α T`` with the least expected error has (Ledoit & Wolf 2004, for any target)

    α_e = min(1, ((tr C_e)² + ‖C_e‖²) / (t_e ‖C_e − T_e‖²))

and 1 for an expert that no token was sent to. Experts that read the layer's states are given vectors of one kind, and
T is the mean of all that the layer's experts were given. What an expert makes itself, the inputs of its second matrix,
has units of its own, and T is a multiple of the identity with the mean diagonal of C_e.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tensorfold.models.anatomy import Matrix


def shrunk_experts(
    moments: Mapping[str, Tensor], tokens: Mapping[str, int], layers: Iterable[Matrix], width: int
) -> dict[str, Tensor]:
    """The moments, those of experts shrunk; also of experts that were sent nothing, if their layer was sent anything.

    Args:
        moments: C by name, of layers that were called; those that are no experts are returned as they are.
        tokens: t by name; none is 0.
        layers: What the moments are of, and experts that were not called.
        width: Number of features of the states between blocks.
    """
    found = dict(moments)
    families: dict[str, list[Matrix]] = {}
    for layer in layers:
        if layer.group == "experts":
            families.setdefault(layer.name.rpartition(".")[0], []).append(layer)
    for experts in families.values():
        called = [expert.name for expert in experts if expert.name in moments and tokens.get(expert.name)]
        if not called:
            continue
        total = sum(tokens[name] for name in called)
        pooled = torch.zeros_like(moments[called[0]])  # (n, n)
        for name in called:
            pooled.add_(moments[name], alpha=tokens[name] / total)
        reads_states = experts[0].in_features == width != experts[0].out_features
        for expert in experts:
            own, count = moments.get(expert.name), tokens.get(expert.name, 0)
            target = pooled if reads_states else _round(pooled if own is None else own)
            amount = 1.0 if own is None else shrinkage(own, target, count)
            found[expert.name] = target if own is None else (1 - amount) * own + amount * target
    return found


def shrinkage(moment: Tensor, target: Tensor, tokens: int) -> float:
    """α for a moment (n, n) of so many vectors and a target (n, n)."""
    if not tokens:
        return 1.0
    wide = moment.double()
    noise = float(wide.trace() ** 2 + wide.square().sum()) / tokens
    distance = float((wide - target.double()).square().sum())
    return min(1.0, noise / distance) if distance else 1.0


def _round(moment: Tensor) -> Tensor:
    """The multiple of the identity with the mean diagonal of a moment (n, n)."""
    return moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
