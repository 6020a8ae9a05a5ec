"""What ``heal`` is given, looked at before anything is changed: models, settings, reporters, text."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

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


def check_reporters(report_to: str | list[str]) -> None:
    """Raise :class:`InputError` for what the Trainer would refuse only after the blocks are healed."""
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
    """All settings of a run; a teacher that no term of the loss names means distillation.

    Raises:
        InputError: Unknown keys, or nothing to do.
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
    """What to tokenise: see ``text`` of :func:`heal`."""
    if isinstance(text, str | os.PathLike):
        return text
    items = list(text) if isinstance(text, Sequence) else []
    if items and all(isinstance(item, os.PathLike) for item in items):
        return items
    if not items or not all(isinstance(item, str) for item in items):
        raise InputError(f"heal: text={text!r:.80}; needed a TEXT, a list of paths to texts, or a list of documents.")
    return Memory(f"{len(items)} documents", tuple(items))


def tokens_of(
    source: Source,
    tokenizer: Any,
    models: Sequence[PreTrainedModel],
    settings: HealSettings,
    state: PartialState,
) -> TokenCache:
    """The text as tokens on disk, which the models, the student first, have rows for.

    Raises:
        InputError: No such text, one too short, or blocks or tokens that the model has no place for.
    """
    limit = context_length(models[0].config)
    if limit is not None and settings.block > limit:
        raise InputError(f"heal: block={settings.block}; needed at most the {limit} positions of the model.")
    names = [source] if isinstance(source, str | os.PathLike) else [] if isinstance(source, Memory) else source
    hub = [texts.locate(os.fspath(name), "train").dataset for name in names]
    most = None
    if any(dataset is not None and dataset.first is not None for dataset in hub):
        # Of a data set of billions of tokens, what the run can use; a power of two, so that few caches serve all runs.
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
