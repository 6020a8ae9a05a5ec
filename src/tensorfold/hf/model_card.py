"""The README of a folded checkpoint: how to load it, what was done, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def model_card(
    card: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]] = (),
    *,
    path: str = "PATH",
    size: int | None = None,
) -> str:
    """README of a folded checkpoint: how to load it first, then what was done and what is known of it.

    Args:
        card: ``base_model``, ``recipe``, ``parameters_before``, ``parameters_after``, ``bytes_before``,
            ``bytes_after``, and ``calibration`` if any text was used, ``heal`` if it was healed, ``modules``. Missing
            entries are left out.
        evaluations: What ``tensorfold eval --record`` noted, oldest first; of equal protocol, text and tokens the last.
        path: Where the checkpoint lies, as code that loads it says it.
        size: Bytes of its weight files.
    """
    before, after = (_count(card.get(f"parameters_{when}")) for when in ("before", "after"))
    where = path if path == "PATH" else repr(path).replace("'", '"')
    lines = [
        "```python",
        "import tensorfold",
        "",
        f"model = tensorfold.load({where})  # raises if any weight is missing",
        f"# after the import, AutoModelForCausalLM.from_pretrained({where}) works too",
        "```",
        "",
        "Without `import tensorfold`, transformers only warns and fills the folded layers with random numbers.",
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


def source_line(stored: Mapping[str, Any]) -> str:
    """What a model's weights are in the quantised file that they are read from.

    Args:
        stored: ``file``; ``bytes`` of it; ``numbers``, how many are of each type.
    """
    numbers = stored.get("numbers")
    kinds = numbers.items() if isinstance(numbers, Mapping) else ()
    shares = ", ".join(f"{_number(count)} numbers in {_text(kind)}" for kind, count in kinds)
    size = stored.get("bytes")
    megabytes = f" ({size / 1e6:.1f} MB)" if type(size) is int else ""
    return f"{shares} of {_text(stored.get('file', 'a file'))}{megabytes}, dequantised on reading"


def _measured(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of recorded evaluations, and one of the tasks of lm-eval; nothing where there are none."""
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
    """On one line, and in characters that UTF-8 has: a card may come from anyone."""
    return " ".join(str(value).encode(errors="backslashreplace").decode().split())


def _count(value: Any) -> int:
    """A number of parameters; 0 for anything else."""
    return value if type(value) is int and 0 < value < 2**63 else 0


def _row(*cells: str) -> str:
    return "| " + " | ".join(_text(cell).replace("|", "/") for cell in cells) + " |"


def _number(value: Any) -> str:
    """Six significant digits, counts whole; empty for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
