"""The hooks by which ``from_pretrained`` rebuilds folded modules and ``save_pretrained`` writes them.

transformers calls any method that changes modules before loading a quantizer; importing this file registers ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from tensorfold.algebra.specs.structure import Structure
from tensorfold.hf.config import NAME, TensorfoldConfig
from tensorfold.nn.base import ORDERS, StoresOrders

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_quantizer(NAME)
class TensorfoldQuantizer(HfQuantizer):
    """Quantizer that swaps dense modules for empty folded ones before the weights are read."""

    requires_calibration = False
    quantization_config: TensorfoldConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        # Imported here because this file is loaded from inside transformers' own import (see tensorfold/__init__.py).
        from tensorfold.hf.modules import install
        from tensorfold.hf.naming import for_model

        config = for_model(self.quantization_config, model)
        if config is not self.quantization_config:
            self.quantization_config = model.config.quantization_config = config
        install(model, config.specs, config.tied, config.split)
        if config.int8:
            from tensorfold.hf.int8_modules import install_int8

            install_int8(model, config.int8)
        _own_resizing(model)
        _lift_restrictions(model, config)
        # Earlier versions stored a tied head's orders beside the table's.
        old = [rf"^{re.escape(head)}\.({'|'.join(ORDERS)})$" for head in config.tied.values()]
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *old}
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for module in model.modules():
            if isinstance(module, StoresOrders):
                module.widen_orders()
        for table, head in self.quantization_config.tied.items():
            tied = model.get_submodule(head)
            if isinstance(tied, StoresOrders):
                tied.share_orders(model.get_submodule(table))
        return model

    def update_weight_conversions(self, weight_conversions: Any, model: PreTrainedModel) -> Any:
        from tensorfold.hf.conversions import without_folded_experts

        return without_folded_experts(model, super().update_weight_conversions(weight_conversions, model))

    def is_serializable(self) -> bool:
        return True

    def dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        """Make a folded model dense in place and return it; ``model.dequantize()`` calls this.

        Args:
            model: Folded.
            dtype: Dtype of its weights afterwards; their own if None.

        Raises:
            InputError: The model is in int8.
        """
        from tensorfold.hf.dense import become_plain

        become_plain(model, dtype)
        self.remove_quantization_config(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        return None, {}

    @property
    def is_trainable(self) -> bool:
        return not self.quantization_config.int8

    @property
    def is_qat_trainable(self) -> bool:
        return not self.quantization_config.int8

    @property
    def is_compileable(self) -> bool:
        return True


def mark_folded(
    model: PreTrainedModel, specs: Mapping[str, Structure], tied: Mapping[str, str], split: Mapping[str, list[int]]
) -> None:
    """Give a model that was folded in memory the configuration and quantizer that loading it would give.

    Args:
        model: Folded model.
        specs: Structure of every folded module, by full name.
        tied: Names of tied output heads, by the name of their folded table.
        split: Sizes of the parts of every linear layer that was split, by full name.
    """
    mark(model, TensorfoldConfig({name: spec.to_dict() for name, spec in specs.items()}, tied, split))


def mark(model: PreTrainedModel, config: TensorfoldConfig) -> None:
    """Give a model in memory a description of its folded modules, and the quantizer that writes it."""
    from tensorfold.hf.conversions import keep_expert_names

    model.config.quantization_config = config
    model.hf_quantizer = TensorfoldQuantizer(config, pre_quantized=True)
    model.quantization_method = NAME  # type: ignore[assignment]
    keep_expert_names(model)
    _own_resizing(model)
    _lift_restrictions(model, config)


def _lift_restrictions(model: PreTrainedModel, config: TensorfoldConfig) -> None:
    """Allow the casts that transformers refuses for packed weights.

    Cores are ordinary parameters. int8 codes are no floating-point numbers and no cast touches them, but they cannot be
    trained, so a model with some keeps ``is_quantized``, which keeps ``Trainer`` off.
    """
    model.is_quantized = bool(config.int8)  # type: ignore[assignment]
    for name, cast in (("half", nn.Module.half), ("float", nn.Module.float)):
        if config.int8:
            setattr(model, name, partial(cast, model))  # a bound method would not be pickled


def _own_resizing(model: PreTrainedModel) -> None:
    """Let the model's ``resize_token_embeddings`` know of folded tables and heads; transformers' own reads weights."""
    from tensorfold.hf.vocabulary import resize_token_embeddings

    # Not a bound method, which would come out of a pickle as transformers' own.
    model.resize_token_embeddings = partial(resize_token_embeddings, model)  # type: ignore[method-assign]
