"""Names of weights in files where transformers stores them under others: folded experts are stored under their own.

Checkpoints on the hub hold a tensor for each expert. transformers joins them on loading and parts them on saving
(``transformers.core_model_loading``), which it cannot do to the cores of folded experts.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightTransform

from tensorfold.models.experts import stacks


def without_folded_experts(model: PreTrainedModel, conversions: Sequence[WeightTransform]) -> list[WeightTransform]:
    """Conversions without those that would part, on saving, a tensor of experts that the model has taken apart."""
    names = [f"{name}.0.weight" for name in stacks(model)]
    return [each for each in conversions if not (isinstance(each, WeightConverter) and _parts_any(each, names))]


def _parts_any(conversion: WeightConverter, names: Sequence[str]) -> bool:
    try:
        back = conversion.reverse_transform()
    except (NotImplementedError, ValueError):  # it has no inverse, so nothing is saved through it
        return False
    return any(back.rename_source_key(name)[1] is not None for name in names)


def keep_expert_names(model: PreTrainedModel) -> None:
    """Let ``save_pretrained`` write the folded experts of a model in memory under the names that they have in it."""
    if not stacks(model):
        return
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # as transformers finds them for a model that was not loaded
        found = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [each for each in found if not isinstance(each, PrefixChange)]
    model._weight_conversions = without_folded_experts(model, conversions)
