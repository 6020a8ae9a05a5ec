"""The two losses of healing on logits, cross-entropy and distillation, with their gradient in one pass over the rows.

A row of logits is as long as the vocabulary, and a step has one for every token: 2,048 tokens of a vocabulary of 49,152
are 400 MB in float32, which autograd reads and writes many times over, term by term. Here a few rows at a time are read
once, and both terms and their gradient follow from the same softmax (``studies/heal/loss_time.py`` times the two).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# How many logits are worked on at a time: on a processor, so that their copies in float32 stay in the cache.
_ON_CPU, _ON_CARDS = 1 << 20, 1 << 26


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean of −log p(next token) in nats.

    Args:
        logits: Shape (batch, length, vocabulary).
        labels: Token ids, shape (batch, length); -100 where a token is not to be predicted.
    """
    return logit_losses(logits, labels, cross_entropy=1.0)[0]


def logit_losses(
    logits: Tensor,
    labels: Tensor | None = None,
    teacher: Tensor | None = None,
    cross_entropy: float = 0.0,
    kl: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of :func:`cross_entropy` and ``T²·KL(teacher ‖ student)``, and each of weight other than 0.

    The divergence is that of distillation (Hinton et al., arXiv 1503.02531), a mean over all tokens, in nats.

    Args:
        logits: Of the student, shape (batch, length, vocabulary).
        labels: Token ids, shape (batch, length), -100 where a token is not to be predicted; for the cross-entropy.
        teacher: Logits of the teacher, shape (batch, length, vocabulary); for the divergence.
        cross_entropy: Weight of the cross-entropy.
        kl: Weight of the divergence.
        temperature: T of the divergence.

    Returns:
        The sum, a scalar in float32 with its gradient; and its terms by name, without weights and detached.
    """
    batch, length, vocabulary = logits.shape
    targets = None
    if cross_entropy:
        assert labels is not None
        targets = torch.full((batch, length), -100, dtype=torch.long, device=logits.device)
        targets[:, :-1] = labels[:, 1:]
        targets = targets.flatten()
    wanted = None if teacher is None or not kl else teacher.reshape(-1, vocabulary)
    total, entropy, divergence = _LogitLosses.apply(  # type: ignore[no-untyped-call]
        logits.reshape(-1, vocabulary), targets, wanted, cross_entropy, kl, temperature
    )
    terms = {"cross_entropy": entropy} if cross_entropy else {}
    return total, terms | ({"kl": divergence} if kl else {})


class _LogitLosses(torch.autograd.Function):
    """Both losses of rows of logits; the gradient, of the dtype of the logits, is made in the forward pass.

    With p and q the softmax of student and teacher: the gradient of −log p[y] is p − 1_y, and that of
    ``T²·KL(q ‖ p)`` at temperature T is ``T·(p − q)``.
    """

    @staticmethod
    def forward(
        context: Any,
        logits: Tensor,
        targets: Tensor | None,
        teacher: Tensor | None,
        entropy_weight: float,
        kl_weight: float,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = len(logits)
        nothing = logits.new_zeros((), dtype=torch.float32)
        entropies, divergences = [nothing], [nothing]
        predicted = math.nan if targets is None else int((targets >= 0).sum())  # without any, 0/0 as a mean over none
        gradient = torch.empty_like(logits) if logits.requires_grad else None
        rows = max(1, (_ON_CPU if logits.device.type == "cpu" else _ON_CARDS) // logits.shape[1])
        for first in range(0, count, rows):
            part = slice(first, first + rows)
            given = logits[part].float()
            log_p = given.log_softmax(-1)
            slope = None
            if targets is not None:
                target = targets[part]
                scored = (target >= 0).to(log_p.dtype)[:, None]
                index = target.clamp_min(0)[:, None]
                entropies.append(-(log_p.gather(1, index) * scored).sum())
                if gradient is not None:
                    scale = scored * (entropy_weight / predicted if predicted else math.nan)
                    slope = log_p.exp().mul_(scale).scatter_add_(1, index, -scale)
            if teacher is not None:
                if temperature != 1:
                    log_p = (given / temperature).log_softmax(-1)
                wanted = teacher[part].float()
                log_q = (wanted if temperature == 1 else wanted / temperature).log_softmax(-1)
                q = log_q.exp()
                divergences.append((q * log_q.sub_(log_p)).sum())
                if gradient is not None:
                    away = log_p.exp_().sub_(q).mul_(kl_weight * temperature / count)
                    slope = away if slope is None else slope.add_(away)
            if gradient is not None and slope is not None:
                gradient[part] = slope
        entropy = torch.stack(entropies).sum() / (predicted or math.nan)
        divergence = temperature**2 * torch.stack(divergences).sum() / count
        terms = ((entropy_weight, entropy, targets), (kl_weight, divergence, teacher))
        total = torch.stack([weight * term for weight, term, given in terms if given is not None]).sum()
        context.mark_non_differentiable(entropy, divergence)
        context.save_for_backward(gradient)
        return total, entropy, divergence

    @staticmethod
    def backward(context: Any, outer: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = context.saved_tensors
        scaled = gradient if gradient is None else gradient * outer.to(gradient.dtype)
        return scaled, None, None, None, None, None
