"""The hooks by which ``from_pretrained`` rebuilds folded modules and ``save_pretrained`` writes them.

transformers calls any method that changes modules before loading a quantizer; importing this file registers ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tensorfold.algebra.any_spec import AnySpec, spec_from_dict
from tensorfold.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "tensorfold"
FORMAT = 1


@register_quantization_config(NAME)
class TensorfoldConfig(QuantizationConfigMixin):
    """What a folded checkpoint's ``config.json`` says: the spec of every folded module, and which heads are tied.

    Raises:
        InputError: A newer format than this version reads, or a spec that no operator can have.
    """

    def __init__(
        self,
        modules: Mapping[str, dict[str, Any]] | None = None,
        tied: Mapping[str, str] | None = None,
        split: Mapping[str, list[int]] | None = None,
        format: int = FORMAT,
        **_: Any,
    ) -> None:
        self.quant_method = NAME  # type: ignore[assignment]
        self.format = format
        if format != FORMAT:
            raise InputError(
                f"checkpoint: folded format {format!r}; this version reads {FORMAT}. Use the version that wrote it."
            )
        if not isinstance(modules, Mapping) or not isinstance(tied or {}, Mapping):
            raise InputError("checkpoint: quantization_config has no mapping of modules; the file is damaged.")
        self.modules = {str(name): spec_from_dict(dict(data)).to_dict() for name, data in modules.items()}
        self.split = {str(name): [int(size) for size in sizes] for name, sizes in (split or {}).items()}
        self.tied = {str(name): str(head) for name, head in (tied or {}).items()}

    @property
    def specs(self) -> dict[str, AnySpec]:
        return {name: spec_from_dict(data) for name, data in self.modules.items()}


@register_quantizer(NAME)
class TensorfoldQuantizer(HfQuantizer):
    """Swaps the dense modules for empty folded ones before the weights are read."""

    requires_calibration = False
    quantization_config: TensorfoldConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        # Imported here because this file is loaded from inside transformers' own import (see tensorfold/__init__.py).
        from tensorfold.hf.swap import install

        config = self.quantization_config
        install(model, config.specs, config.tied, config.split)
        return model

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        return None, {}

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def mark_folded(
    model: PreTrainedModel, specs: Mapping[str, AnySpec], tied: Mapping[str, str], split: Mapping[str, list[int]]
) -> None:
    """Give a model that was folded in memory the configuration that ``from_pretrained`` would have given it."""
    config = TensorfoldConfig({name: spec.to_dict() for name, spec in specs.items()}, tied, split)
    model.config.quantization_config = config
    model.hf_quantizer = TensorfoldQuantizer(config, pre_quantized=True)
    model.is_quantized = True  # type: ignore[assignment]
    model.quantization_method = NAME  # type: ignore[assignment]
