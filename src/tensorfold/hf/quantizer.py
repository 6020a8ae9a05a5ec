"""The hooks by which ``from_pretrained`` rebuilds folded modules and ``save_pretrained`` writes them.

transformers calls any method that changes modules before loading a quantizer; importing this file registers ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tensorfold.algebra.specs.registry import spec_from_dict
from tensorfold.algebra.specs.structure import Structure
from tensorfold.errors import InputError
from tensorfold.nn.base import ORDERS, StoresOrders

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "tensorfold"
FORMAT = 1
FORMAT_INT8 = 2  # with modules in int8, which a reader of the first format would take for damage


@register_quantization_config(NAME)
class TensorfoldConfig(QuantizationConfigMixin):
    """What a folded checkpoint's ``config.json`` says: the spec of every folded module, which heads are tied, and which
    modules, folded or not, are in int8.

    Raises:
        InputError: A newer format than this version reads, or a spec that no operator can have.
    """

    int8: tuple[str, ...] | list[str] = ()  # in the file only where there are any

    def __init__(
        self,
        modules: Mapping[str, dict[str, Any]] | None = None,
        tied: Mapping[str, str] | None = None,
        split: Mapping[str, list[int]] | None = None,
        format: int | None = None,
        int8: Iterable[str] = (),
        **_: Any,
    ) -> None:
        self.quant_method = NAME  # type: ignore[assignment]
        if int8:
            self.int8 = [str(name) for name in int8]
        self.format = (FORMAT_INT8 if int8 else FORMAT) if format is None else format
        if self.format not in (FORMAT, FORMAT_INT8):
            raise InputError(
                f"checkpoint: folded format {format!r}; this version reads {FORMAT} and {FORMAT_INT8}. Use the version "
                "that wrote it."
            )
        if not isinstance(modules, Mapping) or not isinstance(tied or {}, Mapping):
            raise InputError("checkpoint: quantization_config has no mapping of modules; the file is damaged.")
        self.modules = {str(name): spec_from_dict(dict(data)).to_dict() for name, data in modules.items()}
        self.split = {str(name): [int(size) for size in sizes] for name, sizes in (split or {}).items()}
        self.tied = {str(name): str(head) for name, head in (tied or {}).items()}

    @property
    def specs(self) -> dict[str, Structure]:
        return {name: spec_from_dict(data) for name, data in self.modules.items()}


@register_quantizer(NAME)
class TensorfoldQuantizer(HfQuantizer):
    """Swaps the dense modules for empty folded ones before the weights are read."""

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
            from tensorfold.hf.int8 import install_int8

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

    def is_serializable(self) -> bool:
        return True

    def dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        """The model itself, dense and in the dtype that it has or is given: what ``model.dequantize()`` does, in place.

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
    """Give a model that was folded in memory the configuration that ``from_pretrained`` would have given it."""
    mark(model, TensorfoldConfig({name: spec.to_dict() for name, spec in specs.items()}, tied, split))


def mark(model: PreTrainedModel, config: TensorfoldConfig) -> None:
    """Give a model in memory this configuration, and the quantizer that writes it."""
    model.config.quantization_config = config
    model.hf_quantizer = TensorfoldQuantizer(config, pre_quantized=True)
    model.quantization_method = NAME  # type: ignore[assignment]
    _own_resizing(model)
    _lift_restrictions(model, config)


def _lift_restrictions(model: PreTrainedModel, config: TensorfoldConfig) -> None:
    """Allow the casts that transformers refuses for packed weights.

    Cores are ordinary parameters. Codes are no floating-point numbers and no cast touches them, but they cannot be
    trained, so for int8 the mark stays that keeps ``Trainer`` off.
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
