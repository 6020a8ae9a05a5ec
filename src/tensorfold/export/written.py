"""What every export has in common: a report, a directory that appears whole, and what lies beside the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from tensorfold.errors import TensorfoldError, pass_on_memory, reason
from tensorfold.hf.beside import carry_over
from tensorfold.utils.atomic_files import atomic_directory


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    ``parameters``: of the exported model, shared ones and the scales of int8 once. ``bytes``: of its weight files.
    ``difference``: the largest between a logit of what was written and of the model it was written from, on random
    tokens; in int8 it is what the eight bits cost.

    Of graphs alone: ``bits`` of a stored weight, ``steps`` that were fed one by one with the cache, ``same_tokens``,
    how many of the likeliest tokens after them were the model's, and ``stored``, the numbers that the file holds by
    type.
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
        return f"\n{self.same_tokens} likeliest tokens the same over {self.steps} steps; numbers stored: {held}"


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


def version() -> str:
    """The package's own."""
    from tensorfold import __version__

    return __version__
