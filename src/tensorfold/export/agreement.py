"""What was written against the model it was written from: with its cache step by step, and padded rows together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tensorfold.errors import TensorfoldError
from tensorfold.export.tracing import probe
from tensorfold.hf.dense import check_in_memory
from tensorfold.models.anatomy import context_length

STEPS = 32
_PROMPTS = (11, 5)


@dataclass(frozen=True)
class Agreement:
    """Of logits after prompts and after each greedy step.

    ``difference``: the largest. ``largest``: magnitude of a logit of the model. ``steps``: tokens that were fed one by
    one. ``same``: how many of the likeliest tokens are the model's, of ``compared``.
    """

    difference: float
    largest: float
    steps: int
    same: int
    compared: int


@torch.no_grad()
def agreement(written: PreTrainedModel, model: PreTrainedModel, to: str, steps: int = STEPS) -> Agreement:
    """Compare the two over greedy steps of the model, one row alone and two rows padded on the left.

    Every row of the model is computed by itself, so that what padding does to the written file is seen.

    Raises:
        TensorfoldError: A logit is not finite.
    """
    context = context_length(model.config)
    steps = steps if context is None else max(0, min(steps, context - max(_PROMPTS)))
    ids, _ = probe(model, 2, max(_PROMPTS))
    rows = [ids[row, : min(length, ids.shape[1])] for row, length in enumerate(_PROMPTS)]
    expected, tokens = zip(*(_greedy(model, row[None], steps) for row in rows), strict=True)
    check_finite(torch.stack(expected), to, "the model's own")
    width = max(len(row) for row in rows)
    padded = torch.zeros(2, width, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, values in enumerate(rows):
        padded[row, width - len(values) :], mask[row, width - len(values) :] = values.cpu(), 1
    alone = _forced(written, padded[:1], mask[:1], tokens[0][None])
    together = _forced(written, padded, mask, torch.stack(tokens))
    got, wanted = torch.cat([alone, together]), torch.stack([expected[0], *expected])
    check_finite(got, to, "those of what was written")
    return Agreement(
        difference=(got.cpu().double() - wanted.cpu().double()).abs().max().item(),
        largest=wanted.abs().max().item(),
        steps=steps,
        same=int((got.argmax(-1) == wanted.argmax(-1)).sum()),
        compared=got[..., 0].numel(),
    )


@torch.no_grad()
def expected_logits(model: PreTrainedModel, to: str) -> tuple[dict[str, Any], Tensor]:
    """Random tokens as a model takes them, and the logits (batch, length, vocabulary) that it gives them.

    Raises:
        InputError: Weights are offloaded.
        TensorfoldError: The logits are not finite.
    """
    check_in_memory(model)
    ids, mask = probe(model, 2, 16)
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    logits = model(**inputs).logits
    check_finite(logits, to, "the model's own")
    return inputs, logits


@torch.no_grad()
def compared(
    to: str, written: PreTrainedModel, inputs: dict[str, Any], expected: Tensor, tolerance: float
) -> tuple[float, int]:
    """Largest difference of a logit of what was written, and how many of its likeliest tokens are those expected.

    Args:
        tolerance: In units of the largest expected logit where that is above 1.

    Raises:
        TensorfoldError: The difference is larger, or not finite.
    """
    got = written.to(expected.device)(**inputs).logits  # type: ignore[arg-type]
    check_finite(got, to, "those of what was written")
    difference = (got.cpu().double() - expected.cpu().double()).abs().max().item()
    check_close(to, difference, tolerance * max(1.0, expected.abs().max().item()))
    return difference, int((got.argmax(-1) == expected.argmax(-1)).sum())


def check_finite(logits: Tensor, to: str, whose: str) -> None:
    """Raise :class:`TensorfoldError` for logits with NaN or infinity, which nothing can be compared with."""
    bad = int((~logits.isfinite()).sum())
    if bad:
        raise TensorfoldError(
            f"export --to {to}: of {logits.numel():,} logits on random tokens, {bad:,} of {whose} are NaN or infinite "
            f"in {str(logits.dtype).removeprefix('torch.')}. Nothing was kept. Load the model in bfloat16 or float32; "
            "if that does not help, its weights are damaged."
        )


def check_close(to: str, difference: float, allowed: float) -> None:
    """Raise :class:`TensorfoldError` where logits differ by more than is allowed."""
    if not difference <= allowed:
        raise TensorfoldError(
            f"export --to {to}: logits of what was written differ from the model's by {difference:.1e}; needed at most "
            f"{allowed:.1e}. Nothing was kept. Please report it with the model's config.json."
        )


def _greedy(model: PreTrainedModel, ids: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Last logits (steps + 1, vocabulary) of a prompt (1, length) and after each step, and the steps' tokens."""
    logits, tokens, cache = [], [], None
    for _ in range(steps + 1):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        logits.append(out.logits[0, -1].float().cpu())
        cache = out.past_key_values
        ids = logits[-1].argmax().reshape(1, 1).to(model.device)
        tokens.append(ids[0, 0].cpu())
    return torch.stack(logits), torch.stack(tokens[:-1]) if steps else torch.zeros(0, dtype=torch.long)


def _forced(written: PreTrainedModel, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """Last logits (batch, steps + 1, vocabulary) of prompts and after each of ``tokens`` (batch, steps)."""
    logits, cache = [], None
    for step in range(tokens.shape[1] + 1):
        out = written(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        logits.append(out.logits[:, -1])
        cache = out.past_key_values
        if step < tokens.shape[1]:
            ids = tokens[:, step : step + 1]
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
    return torch.stack(logits, 1)
