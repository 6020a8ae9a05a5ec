"""LoRA on folded layers that ``target_modules`` of a ``peft`` configuration names.

peft knows torch's own layers only, but a configuration may register which class adapts which other layer. Importing
this file makes every ``LoraConfig`` do so, and ``get_peft_model`` and ``PeftModel.from_pretrained`` need nothing else.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

from peft.tuners.lora.config import LoraConfig
from torch import nn

from tensorfold.errors import InputError
from tensorfold.nn import FoldedModule, StackedLinear, StructuredLinear
from tensorfold.nn.int8 import Int8Embedding, Int8Folded, Int8Linear

# Settings of init_lora_weights that do not look at the dense weight.
_STARTS = (True, False, "gaussian")


@functools.cache
def _adapters() -> dict[type[nn.Module], Any]:
    """Adapter class or refusal by class of layer: plain LoRA for linear layers, a refusal for all others."""
    # peft's layers import its configuration, which is being imported when this file is.
    from peft.tuners.lora.layer import Linear

    class FoldedLora(Linear):  # type: ignore[misc]
        """``y = MPO(x) + s · B A x``: the folded layer stays as it is; A (r, in) and B (out, r) are trained."""

        def update_layer(self, adapter_name: str, *args: Any, config: LoraConfig, **options: Any) -> None:
            _check(config)
            super().update_layer(adapter_name, *args, config=config, **options)
            core = self.get_base_layer().cores[0]
            for part in (self.lora_A[adapter_name], self.lora_B[adapter_name]):
                if part.weight.device.type != "meta":
                    part.to(core.device, core.dtype)

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
            raise InputError(
                "LoRA: a folded layer has no dense weight to merge an adapter into; keep the adapter beside it, or "
                "load it on what tensorfold export --to dense writes and merge there."
            )

    refused = (FoldedModule, StackedLinear, Int8Linear, Int8Embedding, Int8Folded)
    return {StructuredLinear: FoldedLora, **dict.fromkeys(refused, _refuse)}


def _check(config: LoraConfig) -> None:
    """Check that a kind of LoRA does not compute with the dense weight of the layer.

    Raises:
        InputError: It does: DoRA, and starts such as PiSSA.
    """
    if config.init_lora_weights not in _STARTS or config.use_dora:
        got = "use_dora=True" if config.use_dora else f"init_lora_weights={config.init_lora_weights!r}"
        raise InputError(
            f"LoRA on a folded layer: got {got}, which computes with its dense weight; needed use_dora=False and "
            f"init_lora_weights one of {', '.join(map(repr, _STARTS))}, or target_modules of dense layers only."
        )


def _refuse(target: nn.Module, *_: Any, **__: Any) -> NoReturn:
    """Raise :class:`InputError`, which says what can be adapted in the place of a layer that cannot."""
    if isinstance(target, StackedLinear):
        raise InputError(
            f"LoRA: target_modules names a matrix that is kept as {len(target)} parts; needed the parts, whose names "
            "are its own with .0, .1, … behind."
        )
    if isinstance(target, Int8Linear | Int8Embedding | Int8Folded):
        raise InputError(
            f"LoRA: target_modules names an {type(target).__name__}, and a model in int8 is for inference only; adapt "
            "the floating-point model that was quantised."
        )
    raise InputError(
        f"LoRA: target_modules names a folded {type(target).__name__}; needed linear layers, dense or folded. Leave "
        "the embedding (and a head tied to it) out of target_modules."
    )


def _teach(cls: type[LoraConfig]) -> None:
    """Let every new configuration of a class register the adapters of folded layers."""
    after = cls.__post_init__

    @functools.wraps(after)
    def teaching(self: LoraConfig) -> None:
        after(self)
        self._register_custom_module(_adapters())

    cls.__post_init__ = teaching


_teach(LoraConfig)
