"""What the configuration of a folded checkpoint says of it, in the form that transformers keeps it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from tensorfold.algebra.specs.registry import spec_from_dict
from tensorfold.algebra.specs.structure import Structure
from tensorfold.errors import InputError

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
