"""Checks of the models, settings, reporters and text of a healing run, before anything is changed."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from tensorfold.calibration.own_text import LABEL, SELF, own_text
from tensorfold.data import texts
from tensorfold.data.documents import Memory, Source
from tensorfold.data.token_cache import TokenCache
from tensorfold.data.tokens import check_ids
from tensorfold.errors import InputError
from tensorfold.hf.dense import check_floating
from tensorfold.models.anatomy import context_length
from tensorfold.recipes.settings import HEAL_NEEDS, HealSettings
from tensorfold.utils.effects import changed, check_effects
from tensorfold.utils.torch_modes import check_takes_gradients
from tensorfold.utils.validation import check_keys, check_types

_MOST_OWN = 1 << 18  # tokens that a model writes for its own training


def check_reporters(report_to: str | list[str]) -> None:
    """Raise :class:`InputError` for a reporter that the Trainer would refuse, which it does after blocks are healed."""
    from transformers.integrations import get_available_reporting_integrations

    check_types("heal", report_to=(report_to, str | list))
    known = ["none", "all", *get_available_reporting_integrations()]
    for name in [report_to] if isinstance(report_to, str) else report_to:
        if name not in known:
            raise InputError(
                f"heal: the Trainer refuses these settings: report_to={name!r:.100} is unknown or not installed; "
                f"needed one of {', '.join(known)}."
            )


def check_student(model: PreTrainedModel, teacher: PreTrainedModel | str | None) -> None:
    """Raise :class:`InputError` for a model that cannot be healed, or not with this teacher."""
    if teacher is model:
        raise InputError("heal: the teacher is the model itself; needed the dense model, loaded separately.")
    check_floating(model)
    check_takes_gradients(model, "heal")


def checked_settings(settings: HealSettings | None, overrides: Mapping[str, Any], teacher: bool) -> HealSettings:
    """The settings of a run.

    Args:
        settings: All settings; the defaults if None.
        overrides: Single settings that replace those, by name.
        teacher: Whether a teacher is given. Where no setting compares with it, ``kl`` is then 1.

    Raises:
        InputError: A key is unknown, a setting has no effect, or there is nothing to do.
    """
    check_keys("heal", dict(overrides), [field.name for field in dataclasses.fields(HealSettings)])
    if settings is not None:
        check_effects("heal", changed(settings), settings.compared if teacher else settings, HEAL_NEEDS)
    settings = dataclasses.replace(settings or HealSettings(), **overrides)
    if not (settings.steps or settings.blockwise_tokens):
        raise InputError("heal: steps=0 and blockwise_tokens=0 leave nothing to do; set one of them.")
    settings = settings.compared if teacher else settings
    check_effects("heal", overrides, settings, HEAL_NEEDS)
    return settings


def source_of(text: Any) -> Source:
    """The training text to tokenise, from the argument ``text`` of :func:`tensorfold.healing.heal.heal`.

    Raises:
        InputError: It is neither a name or path, nor a list of paths, nor a list of documents.
    """
    if isinstance(text, str | os.PathLike):
        return text
    items = list(text) if isinstance(text, Sequence) else []
    named = [isinstance(item, os.PathLike) or item == SELF for item in items]
    if any(isinstance(item, os.PathLike) for item in items) and all(named):
        return items
    if not items or not all(isinstance(item, str) for item in items):
        raise InputError(f"heal: text={text!r:.80}; needed a TEXT, a list of paths to texts, or a list of documents.")
    return Memory(f"{len(items)} documents", tuple(items))


def with_own_text(
    source: Source, model: PreTrainedModel, tokenizer: Any, settings: HealSettings, progress: bool
) -> Source:
    """The training text, the word ``self`` in it replaced by text that the model writes.

    That is as many tokens as the run takes, but no more than a quarter of a million: writing is slower than training.

    Args:
        source: As :func:`source_of` gives it.
        model: The dense model, or the student where there is no teacher.
        tokenizer: The student's tokenizer.
        settings: Settings of the run.
        progress: Whether a progress bar is shown.
    """
    if isinstance(source, Memory) or not (source == SELF or (isinstance(source, list) and SELF in source)):
        return source
    used = settings.steps * settings.batch * settings.block + settings.blockwise_tokens
    tokens = min(_MOST_OWN, math.ceil(used / (1 - settings.validation_fraction)) + 2 * settings.block)
    own = Memory(LABEL, tuple(own_text(model, tokenizer, tokens, progress=progress)))
    return own if source == SELF else [own if each == SELF else each for each in source]  # type: ignore[union-attr]


def tokens_of(
    source: Source,
    tokenizer: Any,
    models: Sequence[PreTrainedModel],
    settings: HealSettings,
    state: PartialState,
) -> TokenCache:
    """The training text as tokens on disk.

    Args:
        source: The text to tokenise.
        tokenizer: The student's tokenizer.
        models: The student, and the teacher where there is one, for their context length and vocabulary.
        settings: Settings of the run.
        state: The processes of the run.

    Raises:
        InputError: There is no such text, it is too short, or its windows or token ids are too large for a model.
    """
    limit = context_length(models[0].config)
    if limit is not None and settings.block > limit:
        raise InputError(f"heal: block={settings.block}; needed at most the {limit} positions of the model.")
    names = [source] if isinstance(source, str | os.PathLike | Memory) else source
    hub = [texts.locate(os.fspath(name), "train").dataset for name in names if not isinstance(name, Memory)]
    most = None
    if any(dataset is not None and dataset.first is not None for dataset in hub):
        # A data set of the hub may have billions of tokens: no more are stored than the run can use, rounded up to a
        # power of two so that few caches serve all runs.
        used = settings.steps * settings.batch * settings.block + settings.blockwise_tokens
        most = 1 << (int(used / (1 - settings.validation_fraction)) + 2 * settings.block).bit_length()
    with state.main_process_first():
        cache = TokenCache.build(
            source,
            tokenizer,
            settings.block,
            validation_fraction=settings.validation_fraction,
            workers=max(1, settings.workers),
            max_tokens=most,
        )
    for model, whose in zip(models, ("heal", "heal, teacher"), strict=False):
        check_ids(model, torch.tensor(cache.largest), whose, tokenizer)
    return cache
