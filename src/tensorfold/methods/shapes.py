"""Kronecker shapes that a matrix can have: their parameters, attainable rank and multiply–adds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table

from tensorfold.algebra.specs.modes import divisors
from tensorfold.algebra.specs.spec import Spec
from tensorfold.models.anatomy import Matrix
from tensorfold.utils.terminal import render


def kronecker_shapes(out_features: int, in_features: int) -> list[Spec]:
    """One-term shapes ``(m1, n1) ⊗ (m2, n2)`` of a matrix, all but (1, 1) and its mirror, by number of parameters."""
    specs = [
        Spec.kronecker(out_features, in_features, (m1, n1))
        for m1 in divisors(out_features)
        for n1 in divisors(in_features)
        if 1 < m1 * n1 < out_features * in_features
    ]
    return sorted(specs, key=lambda spec: (spec.parameters, -spec.out_modes[0]))


def shape_rows(matrices: Iterable[Matrix]) -> list[dict[str, Any]]:
    """Table rows, one for every Kronecker shape of every size of matrix; JSON values by column name."""
    seen: dict[tuple[int, int], list[str]] = {}
    for matrix in matrices:
        seen.setdefault((matrix.out_features, matrix.in_features), []).append(matrix.name)
    return [
        {
            "matrix": names[0],
            "count": len(names),
            "out_features": rows,
            "in_features": columns,
            "factor": [spec.out_modes[0], spec.in_modes[0]],
            "parameters": spec.parameters,
            "attainable_rank": spec.attainable_matrix_rank,
            "full_rank": spec.attainable_matrix_rank == min(rows, columns),
            "macs": spec.macs,
        }
        for (rows, columns), names in seen.items()
        for spec in kronecker_shapes(rows, columns)
    ]


def shape_table(rows: list[dict[str, Any]]) -> str:
    """Plain-text table of the shapes that reach full rank, with the number of the others below it."""
    table = Table(box=None, pad_edge=False)
    table.add_column("matrix (out×in)")
    for heading in ("factor m1×n1", "parameters", "kept", "multiply–adds"):
        table.add_column(heading, justify="right")
    full = [row for row in rows if row["full_rank"]]
    for row in full:
        dense = row["out_features"] * row["in_features"]
        table.add_row(
            f"{row['matrix']} ({row['out_features']}×{row['in_features']})",
            f"{row['factor'][0]}×{row['factor'][1]}",
            f"{row['parameters']:,}",
            f"{row['parameters'] / dense:.2%}",
            f"{row['macs'] / dense:.1%}",
        )
    return (
        f"{render(table)}\n{len(full)} shapes of one term reach full rank; {len(rows) - len(full)} more do not (--json)"
    )
