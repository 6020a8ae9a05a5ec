"""The part of a folded checkpoint's configuration that describes its folded modules: a quantisation configuration."""

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
    """Entry ``quantization_config`` in a folded checkpoint's ``config.json``.

    Args:
        modules: Structure of every folded module in its JSON form, by full name.
        tied: Names of tied output heads, by the name of their folded table.
        split: Sizes of the parts of every linear layer that was split, by full name.
        format: Number of the file format; by default the one that these settings need.
        int8: Names of modules, folded or not, that are in int8.

    Raises:
        InputError: The format is newer than this version reads, or a structure is one that no matrix can have.
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
        """Structure of every folded module, by full name."""
        return {name: spec_from_dict(data) for name, data in self.modules.items()}
