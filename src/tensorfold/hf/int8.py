"""Quantisation of a transformers model's weights to int8."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from tensorfold.errors import InputError
from tensorfold.hf import ties
from tensorfold.hf.config import TensorfoldConfig
from tensorfold.hf.described import check_described
from tensorfold.hf.int8_modules import install_int8, int8_targets
from tensorfold.hf.quantizer import mark
from tensorfold.models.anatomy import check_no_adapter
from tensorfold.models.linear_maps import check_weights
from tensorfold.models.sizes import stored_bytes
from tensorfold.utils.torch_modes import in_usual_modes
from tensorfold.utils.validation import check_types


@dataclass(frozen=True)
class Int8Report:
    """Result of a quantisation to int8.

    Attributes:
        bytes_before: Bytes of all stored parameters and buffers before.
        bytes_after: Bytes of them afterwards.
        modules: Number of modules that are in int8 now.
    """

    bytes_before: int
    bytes_after: int
    modules: int

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    def __str__(self) -> str:
        share = self.bytes_after / self.bytes_before
        return (
            f"{self.bytes_before / 1e6:.1f} MB → {self.bytes_after / 1e6:.1f} MB ({share:.1%}), {self.modules} modules"
        )


@in_usual_modes
def quantize(model: PreTrainedModel, bits: int = 8) -> Int8Report:
    """Turn the weights of linear layers, tables and folded modules into int8 with a scale a row, in place.

    Activations, norms and biases stay in floating point. The model may be dense or folded; the result is saved and
    loaded as folded models are (``save_pretrained``, :func:`tensorfold.load`), and cannot be trained, folded or
    exported as dense any more. ``nn.int8`` says which numbers share a scale, and what the speed is.

    Args:
        model: Model whose weights are quantised.
        bits: Bits of a weight; 8 is the only width.

    Raises:
        InputError: Another number of bits than 8, the model is quantised already, or a weight is not finite; then
            nothing is changed.
    """
    check_types("quantize", bits=(bits, int))
    if bits != 8:
        raise InputError(f"quantize: bits={bits}; needed 8, the only width there is.")
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"quantize: got {type(model).__name__}; needed a transformers model (PreTrainedModel).")
    check_no_adapter(model)
    check_weights(model)
    stored = getattr(model.config, "quantization_config", None)
    if stored is not None and (not isinstance(stored, TensorfoldConfig) or stored.int8):
        raise InputError("quantize: the model is quantised already; load its floating-point weights.")
    if stored is None:
        check_described(model)
    before = stored_bytes(model)
    names = int8_targets(model)
    for name in names:
        if any(parameter.is_meta for parameter in model.get_submodule(name).parameters()):
            raise InputError(f"quantize: {name} has no weights here (meta device); load the model without offloading.")
        if not all(bool(parameter.detach().isfinite().all()) for parameter in model.get_submodule(name).parameters()):
            raise InputError(f"quantize: {name} holds NaN or infinity; repair the checkpoint.")
    if stored is None:
        ties.settle(model)
    install_int8(model, names)
    old = stored or TensorfoldConfig({})
    mark(model, TensorfoldConfig(old.modules, old.tied, old.split, int8=names))
    return Int8Report(before, stored_bytes(model), len(names))
