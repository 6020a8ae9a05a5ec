"""The table of folded modules that a plan and the report of a fold print."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.table import Table

from tensorfold.algebra.specs.structure import Structure
from tensorfold.utils.terminal import render

if TYPE_CHECKING:
    from tensorfold.folding.plan import Plan


def module_table(
    modules: Mapping[str, Structure], errors: Mapping[str, float] | None = None, error_name: str = "error"
) -> str:
    """Plain-text table of folded modules; equal ones of blocks and experts share a row, with their mean error."""
    rows: dict[tuple[str, Structure], list[str]] = {}
    for name, spec in modules.items():
        rows.setdefault((re.sub(r"\.\d+(?=\.|$)", ".*", name), spec), []).append(name)
    table = Table(box=None, pad_edge=False)
    table.add_column("module")
    table.add_column("spec")
    for heading in ("count", "parameters", "kept", "multiply–adds"):
        table.add_column(heading, justify="right")
    if errors is not None:
        table.add_column(error_name, justify="right")
    for (pattern, spec), names in rows.items():
        cells = [
            pattern if len(names) > 1 else names[0],
            str(spec),
            str(len(names)),
            f"{spec.parameters:,}",
            f"{spec.parameters / spec.dense_parameters:.1%}",
            f"{spec.macs / spec.dense_parameters:.1%}",
        ]
        if errors is not None:
            cells.append(f"{sum(errors[name] for name in names) / len(names):.3f}")
        table.add_row(*cells)
    return render(table)


def size_lines(plan: Plan, stored: str | None = None) -> list[str]:
    """Parameters, bytes and multiply–adds a token of the whole model before and after, a sentence each.

    Args:
        stored: The sentence about bytes; by default, of what is stored in the type that the model has.
    """
    before, after = plan.parameters_before, plan.parameters_after
    macs, fewer = plan.macs_before, plan.macs_after
    sent = _macs_of_experts(plan.experts_per_token)
    kept = f"{after / before:.1%} of the model, {plan.kept:.1%} of the targeted matrices"
    return [
        f"{before:,} → {after:,} parameters ({kept})",
        stored or f"{megabytes(plan.bytes_before, plan.bytes_after)} stored, orders of rows and columns included",
        f"{macs:,} → {fewer:,} multiply–adds a token ({fewer / max(1, macs):.1%}){sent}",
    ]


def megabytes(before: float, after: float) -> str:
    """Two numbers of bytes in words."""
    return f"{before / 1e6:,.1f} → {after / 1e6:,.1f} MB"


def _macs_of_experts(per_token: int | None) -> str:
    """What a number of multiply–adds has of experts, to stand behind it; nothing of a model that has none."""
    if per_token is None:
        return ""
    if not per_token:
        return ", without experts: the configuration does not say how many a token is sent to"
    return f", {per_token} expert{'s' * (per_token > 1)} of a layer for each token"
