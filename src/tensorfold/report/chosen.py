"""What was chosen for every matrix, as a table of blocks by matrices: how much of it stays, and why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tensorfold.report.facts import place

if TYPE_CHECKING:
    from tensorfold.report.facts import Chosen, Folded, ModelFacts

_NUMBER = re.compile(r"\.(\d+)(?=\.|$)")  # of an expert, within a block
_NEAR = 0.1  # of a matrix's parameters: how much fewer or more are compared with what it was given


@dataclass(frozen=True)
class Cell:
    """A matrix of a block, or all experts of a tensor.

    Attributes:
        kept: Percentage of its parameters that stays, as text.
        tint: Place of that between the least and the most in the map, 0 to 1.
        reason: Sentences about what it was given, and why.
    """

    kept: str
    tint: float
    reason: str


@dataclass(frozen=True)
class ChosenMap:
    """Map of a model.

    Attributes:
        label: Name of the model.
        columns: Names of the matrices within a block.
        rows: Number of the block and a cell for every column; None where the block has no such matrix.
        outside: Sentences about folded matrices outside the blocks.
    """

    label: str
    columns: list[str]
    rows: list[tuple[int, list[Cell | None]]]
    outside: list[str]

    @property
    def example(self) -> Cell:
        """The cell that keeps least, whose reason stands there until another is pointed at."""
        return min((cell for _, line in self.rows for cell in line if cell is not None), key=lambda cell: cell.tint)


@dataclass(frozen=True)
class _Given:
    """What one matrix was given: its parameters before and after, and sentences about it."""

    name: str
    before: int
    after: int
    error: float | None
    reason: str

    @property
    def kept(self) -> float:
        return self.after / max(1, self.before)

    @property
    def number(self) -> str:
        """Number of the expert."""
        found = _NUMBER.search(place(self.name)[1])
        return f"number {found[1]}" if found else self.name


def chosen_map(model: ModelFacts) -> ChosenMap | None:
    """Map of what every folded or searched matrix was given; None where there is none in the blocks."""
    names = dict.fromkeys((*model.modules, *model.choices))
    given = [found for name in names if (found := _given(name, model.modules.get(name), model.choices.get(name)))]
    cells: dict[tuple[int, str], list[_Given]] = {}
    outside = []
    for each in given:
        block, matrix = place(each.name)
        if block is None:
            outside.append(f"{each.name}: {each.reason}")
        else:
            cells.setdefault((block, _NUMBER.sub("", matrix)), []).append(each)
    if not cells:
        return None
    shares = {key: sum(each.after for each in m) / max(1, sum(each.before for each in m)) for key, m in cells.items()}
    least, most = min(shares.values()), max(shares.values())
    columns = list(dict.fromkeys(column for _, column in cells))
    rows = []
    for block in sorted({block for block, _ in cells}):
        line: list[Cell | None] = []
        for column in columns:
            members = cells.get((block, column))
            if members is None:
                line.append(None)
                continue
            share = shares[block, column]
            tint = (share - least) / (most - least) if most > least else 0.5
            line.append(Cell(f"{100 * share:.0f}", round(tint, 3), f"Block {block}, {column}: {_reason(members)}"))
        rows.append((block, line))
    return ChosenMap(model.label, columns, rows, outside)


def _given(name: str, folded: Folded | None, chosen: Chosen | None) -> _Given | None:
    """What a matrix was given; None where its size before is not known."""
    if folded is not None:
        spec = folded.spec
        what = f"{spec.parameters:,} of {spec.dense_parameters:,} parameters stay, as {spec}."
        why = _comparison(chosen, spec.dense_parameters) if chosen is not None else "The recipe asks for it."
        error = "" if folded.error is None else f" Measured error {folded.error:.3f}."
        reason = f"{what}{error} {why}".rstrip()
        return _Given(name, spec.dense_parameters, spec.parameters, folded.error, reason)
    if chosen is None or not chosen.dense:
        return None
    size = int(chosen.parameters)
    return _Given(name, size, size, 0.0, f"stays as it is. {_comparison(chosen, size)}".rstrip())


def _reason(members: Sequence[_Given]) -> str:
    """Sentences about a cell; of several experts, what all have in common and how far apart they are."""
    if len(members) == 1:
        return members[0].reason
    before, after = sum(each.before for each in members), sum(each.after for each in members)
    low, high = (choose(members, key=lambda each: each.kept) for choose in (min, max))
    errors = [each.error for each in members if each.error is not None]
    mean = f" Mean error {sum(errors) / len(errors):.3f}." if errors else ""
    return (
        f"{len(members)} experts; {after:,} of {before:,} parameters stay, from {low.kept:.0%} ({low.number}) to "
        f"{high.kept:.0%} ({high.number}).{mean}"
    )


def _comparison(chosen: Chosen, before: int) -> str:
    """What the matrix would have lost with fewer and with more parameters, and as another structure of its size."""
    size, error = chosen.parameters, chosen.predicted
    smaller = max((point for point in chosen.curve if point[0] <= size - _NEAR * before), default=None)
    larger = min((point for point in chosen.curve if point[0] >= size + _NEAR * before), default=None)
    parts = [] if error is None or chosen.dense else [f"predicted {error:.3f}"]
    parts += [] if smaller is None else [f"{smaller[1]:.3f} with {smaller[0]:,.0f} parameters"]
    parts += [] if larger is None else [f"{larger[1]:.3f} with {larger[0]:,.0f}"]
    if chosen.rivals:
        spec, other = min(chosen.rivals.items(), key=lambda rival: rival[1])
        parts.append(f"{other:.3f} as {spec}")
    return f"Errors of the search: {'; '.join(parts)}." if parts else ""


def maps_of(models: Sequence[ModelFacts]) -> list[ChosenMap]:
    """Maps of all models that have one."""
    return [found for model in models if (found := chosen_map(model)) is not None]
