"""README of a folded checkpoint: how to load it, how it was folded, and how it was evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorfold.utils.records import read_object

_FOLDED = """```python
import tensorfold

model = tensorfold.load({where})  # raises if any weight is missing
# after the import, AutoModelForCausalLM.from_pretrained({where}) works too
```

Without `import tensorfold`, transformers only warns and fills the folded layers with random numbers."""

_PLAIN = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({where})
```

A plain transformers model of smaller sizes: nothing else is needed to load it."""


def model_card(
    card: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]] = (),
    *,
    path: str = "PATH",
    size: int | None = None,
    plain: bool = False,
) -> str:
    """Text of a folded checkpoint's README: how to load it, then how it was folded and healed, then evaluations.

    Args:
        card: ``base_model``, ``recipe``, ``parameters_before``, ``parameters_after``, ``bytes_before``,
            ``bytes_after``, and ``calibration`` if any text was used, ``heal`` if it was healed, ``modules``. Missing
            entries are left out.
        evaluations: Records of ``tensorfold eval --record``, oldest first; the last one for every protocol, text and
            number of tokens is shown.
        path: Directory or hub id of the checkpoint, for the code that loads it.
        size: Bytes of its weight files.
        plain: Whether transformers alone loads it; see :func:`is_plain`.
    """
    before, after = (_count(card.get(f"parameters_{when}")) for when in ("before", "after"))
    where = path if path == "PATH" else repr(path).replace("'", '"')
    lines = [
        *(_PLAIN if plain else _FOLDED).format(where=where).splitlines(),
        "",
        f"# {_text(card.get('base_model', 'A language model'))}, folded",
        "",
        f"- base model: {_text(card.get('base_model', 'unknown'))}",
        f"- recipe: {_text(card.get('recipe', 'unknown'))}",
    ]
    if isinstance(card.get("source"), Mapping):
        lines.insert(-1, f"- base weights: {source_line(card['source'])}; bytes below are those of the folded weights")
    if before and after:
        lines.append(f"- parameters: {before:,} → {after:,} ({after / before:.1%}), a tied output head counted once")
    before, after = (_count(card.get(f"bytes_{when}")) for when in ("before", "after"))
    if before and after:
        lines.append(f"- stored: {before / 1e6:.1f} → {after / 1e6:.1f} MB when it was folded, orders included")
    if size is not None:
        lines.append(f"- weight files: {size / 1e6:.1f} MB")
    modules = card.get("modules")
    if isinstance(modules, Mapping) and modules:
        lines.append(f"- folded: {len(modules)} matrices; tensorfold.json has their shapes, bonds and errors")
    if card.get("calibration"):
        lines.append(f"- calibration: {_text(card['calibration'])}")
    healed = card.get("heal")
    if isinstance(healed, Mapping):
        lines.append(
            f"- healed: {_number(healed.get('tokens')) or 0} tokens of {_text(healed.get('text'))}, validation loss "
            f"{_text(healed.get('validation_loss_before'))} → {_text(healed.get('validation_loss'))}"
            + ("; nothing helped" if healed.get("helped") is False else "")
        )
    lines.append(f"- folded with tensorfold {_text(card.get('tensorfold', ''))}".rstrip())
    return "\n".join([*lines, *_measured(evaluations)]) + "\n"


def is_plain(directory: Path) -> bool:
    """Whether transformers alone loads the checkpoint in a directory: a model of its own without folded layers."""
    config = read_object(directory / "config.json") or {}
    return "quantization_config" not in config and config.get("model_type") != "picogpt"


def source_line(stored: Mapping[str, Any]) -> str:
    """Line about the quantised file that a model's weights were read from: types, name and size.

    Args:
        stored: ``file``, its name; ``bytes``, its size; ``numbers``, their count by type.
    """
    numbers = stored.get("numbers")
    kinds = numbers.items() if isinstance(numbers, Mapping) else ()
    shares = ", ".join(f"{_number(count)} numbers in {_text(kind)}" for kind, count in kinds)
    size = stored.get("bytes")
    megabytes = f" ({size / 1e6:.1f} MB)" if type(size) is int else ""
    return f"{shares} of {_text(stored.get('file', 'a file'))}{megabytes}, dequantised on reading"


def _measured(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of two Markdown tables, of recorded perplexities and of lm-eval's tasks; none without records."""
    latest = {(str(e.get("protocol")), str(e.get("text")), str(e.get("tokens"))): e for e in evaluations}
    perplexities, tasks = [], []
    for (protocol, text, tokens), found in latest.items():
        results = found.get("results")
        if isinstance(results, Mapping):
            version = found.get("versions", {}).get("lm_eval", "") if isinstance(found.get("versions"), Mapping) else ""
            for task, metrics in results.items():
                values = metrics.items() if isinstance(metrics, Mapping) else ()
                tasks += [_row(f"{protocol} {version}".strip(), task, name, _number(value)) for name, value in values]
        elif _number(found.get("perplexity")):
            accuracy, parameters = _number(found.get("accuracy")), _number(found.get("parameters"))
            if found.get("seen"):
                text += " (not held out)"
            perplexities.append(_row(protocol, text, tokens, _number(found["perplexity"]), accuracy, parameters))
    lines: list[str] = ["", "## What was measured"] if perplexities or tasks else []
    if perplexities:
        lines += [
            "",
            "| protocol | text | tokens | perplexity | accuracy | parameters |",
            "|---|---|---:|---:|---:|---:|",
        ]
    if tasks:
        return [*lines, *perplexities, "", "| protocol | task | metric | value |", "|---|---|---|---:|", *tasks]
    return [*lines, *perplexities]


def _text(value: Any) -> str:
    """Text of a value on one line, in characters that UTF-8 has: a card may come from anyone."""
    return " ".join(str(value).encode(errors="backslashreplace").decode().split())


def _count(value: Any) -> int:
    """Count of parameters from a card's value; 0 for anything but a positive whole number."""
    return value if type(value) is int and 0 < value < 2**63 else 0


def _row(*cells: str) -> str:
    """Row of a Markdown table."""
    return "| " + " | ".join(_text(cell).replace("|", "/") for cell in cells) + " |"


def _number(value: Any) -> str:
    """Text of a number, with six significant digits or, of a count, all; empty for any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
