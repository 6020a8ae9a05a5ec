"""What every export has in common: a report, a directory that appears whole, and what lies beside the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from tensorfold.errors import InputError, TensorfoldError, pass_on_memory, reason
from tensorfold.hf.beside import carry_over
from tensorfold.hf.dense import check_floating
from tensorfold.utils.atomic_files import atomic_directory


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    ``parameters``: of the exported model, shared ones and the scales of int8 once. ``bytes``: of its weight files.
    ``difference``: the largest between a logit of what was written and of the model it was written from, on random
    tokens; in int8 it is what the eight bits cost.

    Of graphs and GGUF files alone: ``bits`` of a stored weight, ``steps`` that were fed one by one with the cache (of
    graphs), ``same_tokens``, how many of the likeliest tokens were the model's, and ``stored``, the numbers that the
    file holds by type.
    """

    to: str
    out: str
    parameters: int
    bytes: int
    difference: float
    seconds: float
    bits: int | None = None
    steps: int | None = None
    same_tokens: str | None = None
    stored: dict[str, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.parameters:,} parameters, {self.bytes / 1e6:.1f} MB; logits within {self.difference:.1e} of the "
            f"model's{self._steps()}\nwritten to {self.out} in {self.seconds:.0f} s"
        )

    def _steps(self) -> str:
        if self.stored is None:
            return ""
        held = ", ".join(f"{count:,} in {kind}" for kind, count in self.stored.items())
        over = "" if self.steps is None else f" over {self.steps} steps"
        return f"\n{self.same_tokens} likeliest tokens the same{over}; numbers stored: {held}"


@contextmanager
def writing(out: str | Path) -> Iterator[Path]:
    """A directory that appears once all of it is there.

    Raises:
        TensorfoldError: It cannot be written.
    """
    try:
        with atomic_directory(out) as partial:
            yield partial
    except (SafetensorError, OSError) as error:
        pass_on_memory(error)
        raise TensorfoldError(f"{out}: could not be written: {reason(error)}; nothing was left of it.") from error


def write_beside(directory: Path, model: PreTrainedModel, tokenizer: Any, readme: str) -> None:
    """Tokenizer, licence and whatever else lies beside the model, and a README."""
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    carry_over(model.config, directory)
    (directory / "README.md").write_text(readme, encoding="utf-8")


def check_float32(model: PreTrainedModel, to: str) -> None:
    """Raise :class:`InputError` unless the model is in float32 on the CPU, from which every precision is made."""
    check_floating(model)
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    if dtypes != {"float32"}:
        raise InputError(
            f"export --to {to}: got a model in {', '.join(sorted(dtypes))}; needed float32, from which every precision "
            'is made: load it with dtype="float32".'
        )
    if model.device != torch.device("cpu"):
        raise InputError(f'export --to {to}: the model is on {model.device}; needed the CPU: model.to("cpu").')


def version() -> str:
    """The package's own."""
    from tensorfold import __version__

    return __version__
