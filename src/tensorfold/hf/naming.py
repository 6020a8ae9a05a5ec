"""Names of a folded checkpoint's modules in a model of another class, without the head or with a classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorfold.hf.config import TensorfoldConfig
from tensorfold.models.experts import fused_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def for_model(config: TensorfoldConfig, model: PreTrainedModel) -> TensorfoldConfig:
    """Description of a checkpoint's folded modules with the names that they have in the class it is loaded into.

    transformers loads one checkpoint as ``LlamaForCausalLM``, as ``LlamaModel``, whose names lack the prefix
    ``model.``, and as ``LlamaForSequenceClassification``, which has no head on the vocabulary. Modules that the class
    lacks are left out. Where the class is the one that was saved, nothing is changed, so that a missing name is an
    error later.

    Args:
        config: Description in the checkpoint.
        model: Model that it is loaded into.
    """
    saved_as = getattr(model.config, "architectures", None) or [type(model).__name__]
    if type(model).__name__ in saved_as:
        return config
    there = {*(name for name, _ in model.named_modules()), *fused_experts(model)}
    prefix = f"{model.base_model_prefix}."

    def here(name: str) -> str | None:
        """Name of a saved module in this model; None where it has none."""
        parent = name.rpartition(".")[0]
        whole = parent if parent in config.split else name
        known = (whole, whole.removeprefix(prefix), prefix + whole)
        return next((each + name.removeprefix(whole) for each in known if each in there), None)

    modules = {new: spec for name, spec in config.modules.items() if (new := here(name)) is not None}
    tied = {new: head for name, kept in config.tied.items() if (new := here(name)) and (head := here(kept))}
    split = {new: sizes for name, sizes in config.split.items() if (new := here(name)) is not None}
    int8 = [new for name in config.int8 if (new := here(name)) is not None]
    return TensorfoldConfig(modules, tied, split, config.format, int8)
