"""The tie of output head and input table, made equal in the configuration and in the weights."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from tensorfold.errors import InputError
from tensorfold.models.tied_heads import is_promised, is_said, tied_head


def disagreement(model: PreTrainedModel) -> str | None:
    """Warning for a model whose configuration and weights disagree on the tie of head and table; None if they agree."""
    head = tied_head(model)
    if head is None and is_promised(model):
        return (
            "the configuration ties the output head to the input table, but the head has a weight of its own: it stays "
            "its own, and the configuration says so from now on"
        )
    if head is None or is_said(model):
        return None
    return (
        f"{head} shares the input table's weight, which the configuration does not say: they stay tied, and the "
        "configuration says so from now on"
    )


def check_sayable(model: PreTrainedModel) -> None:
    """Check that a model whose head and table share a weight is of a class that can be saved and loaded so.

    Raises:
        InputError: The class has no such tie.
    """
    head = tied_head(model)
    if head is not None and f"{head}.weight" not in _ties_once_said(model):
        raise InputError(
            f"{type(model).__name__}: {head} shares the input table's weight by assignment, which this class cannot "
            "save and load as tied; give the head a copy of its own, or fold with untie (--untie)."
        )


def settle(model: PreTrainedModel) -> None:
    """Make the configuration agree with the weights on the tie of head and table, in place, so that it is saved so.

    Two tensors of equal values that the configuration ties become one.

    Raises:
        InputError: The class has no such tie (:func:`check_sayable`); nothing has been changed.
    """
    check_sayable(model)
    if tied_head(model) is None:
        if is_promised(model):
            _cut_promises(model)
        return
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    if is_said(model):
        return
    promised = _ties_once_said(model)
    for config in _configs(model):
        if _has_tie(config):
            config.tie_word_embeddings = True
    model.all_tied_weights_keys = {**model.all_tied_weights_keys, **promised}


def settled_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Copy of a model's configuration that ties head and table if the weights are tied."""
    config, tied = copy.deepcopy(model.config), tied_head(model) is not None
    if tied != is_said(model):
        for part in (config, config.get_text_config()):
            if _has_tie(part):
                part.tie_word_embeddings = tied
    return config


def _ties_once_said(model: PreTrainedModel) -> dict[str, str]:
    """Ties, targets to sources, that a model's class makes where its configurations say ``tie_word_embeddings``."""
    before = [(config, config.tie_word_embeddings) for config in _configs(model) if _has_tie(config)]
    try:
        for config, _ in before:
            config.tie_word_embeddings = True
        return model.get_expanded_tied_weights_keys(all_submodels=True)
    finally:
        for config, value in before:
            config.tie_word_embeddings = value


@torch.no_grad()
def _cut_promises(model: PreTrainedModel) -> None:
    """Undo all ties of a model whose head has its own weight; lesser ties, under one setting with it, get copies."""
    for target in model.all_tied_weights_keys:
        tensor = model.get_parameter_or_buffer(target)
        source = model.get_parameter_or_buffer(model.all_tied_weights_keys[target])
        if tensor is source:
            owner, _, attribute = target.rpartition(".")
            own = tensor.detach().clone()
            value = torch.nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else own
            setattr(model.get_submodule(owner), attribute, value)
    for config in _configs(model):
        if _has_tie(config):
            config.tie_word_embeddings = False
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module._tied_weights_keys, module.all_tied_weights_keys = {}, {}


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Configurations of the model and of the models inside it, each once."""
    found: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            for config in (module.config, module.config.get_text_config()):
                found[id(config)] = config
    return list(found.values())


def _has_tie(config: PreTrainedConfig) -> bool:
    """Whether a configuration has the setting ``tie_word_embeddings``."""
    return isinstance(getattr(config, "tie_word_embeddings", None), bool)
