"""Which tokens a healing run trains on and is judged by."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from torch.utils.data import Subset

from tensorfold.data.seen_text import SELECTION, TRAINING, Seen
from tensorfold.data.token_cache import TokenBlocks, TokenCache
from tensorfold.healing.trainer import RunOrder
from tensorfold.recipes.settings import HealSettings

_MOST = 1 << 24  # tokens of the training text that are looked at


def blockwise_order(cache: TokenCache, settings: HealSettings) -> RunOrder:
    """Training blocks that are healed block by block."""
    blocks = len(cache.train)
    return RunOrder(blocks, min(blocks, max(1, settings.blockwise_tokens // settings.block)), settings.seed)


def seen_by_healing(
    cache: TokenCache, settings: HealSettings, validation: Subset[Any] | None, kept: str | None, steps: int
) -> list[Seen]:
    """Note the text of a run: what trained the weights that were ``kept``, and what chose them.

    Of a long training text it is the first tokens, in the order of the run.

    Args:
        steps: Taken end to end.
    """
    most = _MOST // settings.block
    found = []
    if settings.blockwise_tokens and kept != "start":
        order = blockwise_order(cache, settings)
        found.append(_noted(TRAINING, cache, cache.train, itertools.islice(order, most)))
    if kept == "steps":
        draws = settings.windows == "random"
        blocks = cache.train_anywhere if draws else cache.train
        order = RunOrder(len(blocks), min(steps * settings.batch, most), settings.seed, draws)
        found.append(_noted(TRAINING, cache, blocks, order))
    if validation is not None and (settings.select == "best" or settings.patience is not None):
        found.append(_noted(SELECTION, cache, cache.validation, validation.indices))
    return found


def selected_on(cache: TokenCache, settings: HealSettings, validation: Subset[Any] | None) -> dict[str, Any] | None:
    """Windows that chose the weights: of which text and cache, how long, and at which tokens they begin."""
    if validation is None:
        return None
    blocks = cache.validation
    begins = [blocks.first + index * blocks.stride for index in validation.indices]
    return {"text": cache.label, "cache": cache.key, "length": settings.block, "begin_at": begins}


def _noted(purpose: str, cache: TokenCache, blocks: TokenBlocks, indices: Iterable[int]) -> Seen:
    return Seen.of(purpose, cache.label, blocks.stretches(indices))
