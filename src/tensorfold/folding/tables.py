"""The table of folded modules that a plan and the report of a fold print."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rich.table import Table

from tensorfold.algebra.specs.structure import Structure
from tensorfold.utils.terminal import render


def module_table(
    modules: Mapping[str, Structure],
    parameters: tuple[int, int],
    stored: tuple[int, int],
    macs: tuple[int, int],
    kept: float,
    errors: Mapping[str, float] | None = None,
    error_name: str = "error",
    warnings: Sequence[str] = (),
) -> str:
    """Plain-text table of folded modules; equal ones of different blocks share a row, with the mean of their errors.

    Args:
        parameters: Of the whole model, before and after.
        stored: Bytes of the whole model where it is stored, before and after.
        macs: Multiply–adds a token of all linear layers, before and after.
        kept: Fraction of the targeted matrices' parameters that stays.
    """
    rows: dict[tuple[str, Structure], list[str]] = {}
    for name, spec in modules.items():
        rows.setdefault((re.sub(r"\.\d+\.", ".*.", name), spec), []).append(name)
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
    (before, after), (bytes_before, bytes_after) = parameters, stored
    totals = [
        f"{before:,} → {after:,} parameters ({after / before:.1%} of the model, {kept:.1%} of the targeted matrices)",
        f"{bytes_before / 1e6:,.1f} → {bytes_after / 1e6:,.1f} MB stored, orders of rows and columns included",
        f"{macs[0]:,} → {macs[1]:,} multiply–adds a token ({macs[1] / max(1, macs[0]):.1%})",
    ]
    return "\n".join([render(table), *totals, *(f"warning: {warning}" for warning in warnings)])
