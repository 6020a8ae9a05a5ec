"""The windows that a healing run trains on and is judged by, for its order and for the model's card."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from torch.utils.data import Subset

from tensorfold.data.seen_text import SELECTION, TRAINING, Seen
from tensorfold.data.token_cache import TokenCache
from tensorfold.data.windows import TokenWindows
from tensorfold.healing.setup import RunOrder
from tensorfold.recipes.settings import HealSettings

_MOST = 1 << 24  # tokens of a training text that its sketch is made of


def blockwise_order(cache: TokenCache, settings: HealSettings) -> RunOrder:
    """The training windows on which blocks are healed one by one, as indices into ``cache.train``."""
    windows = len(cache.train)
    return RunOrder(windows, min(windows, max(1, settings.blockwise_tokens // settings.block)), settings.seed)


def seen_by_healing(
    cache: TokenCache, settings: HealSettings, validation: Subset[Any] | None, kept: str | None, steps: int
) -> list[Seen]:
    """Sketches of the texts that trained the weights of a healing run, and of those that selected them.

    A long training text is represented by the first 16 million tokens in the order of the run.

    Args:
        cache: The training text as tokens.
        settings: Settings of the run.
        validation: The windows that the run was judged by; None without any.
        kept: Whose weights are kept: ``steps``, ``blocks`` or ``start``.
        steps: Steps taken end to end.
    """
    most = _MOST // settings.block
    found = []
    if settings.blockwise_tokens and kept != "start":
        order = blockwise_order(cache, settings)
        found.append(_noted(TRAINING, cache, cache.train, itertools.islice(order, most)))
    if kept == "steps":
        draws = settings.windows == "random"
        windows = cache.train_anywhere if draws else cache.train
        order = RunOrder(len(windows), min(steps * settings.batch, most), settings.seed, draws)
        found.append(_noted(TRAINING, cache, windows, order))
    if validation is not None and (settings.select == "best" or settings.patience is not None):
        found.append(_noted(SELECTION, cache, cache.validation, validation.indices))
    return found


def selected_on(cache: TokenCache, settings: HealSettings, validation: Subset[Any] | None) -> dict[str, Any] | None:
    """The windows that selected the weights, for the model's card; None without any.

    Returns:
        ``text``, its name; ``cache``, the key of its tokens; ``length``, tokens of a window; ``begin_at``, the index in
        the token stream of each window's first token.
    """
    if validation is None:
        return None
    windows = cache.validation
    begins = [windows.begin_at(index) for index in validation.indices]
    return {"text": cache.label, "cache": cache.key, "length": settings.block, "begin_at": begins}


def _noted(purpose: str, cache: TokenCache, windows: TokenWindows, indices: Iterable[int]) -> Seen:
    return Seen.of(purpose, cache.label, windows.stretches(indices))
