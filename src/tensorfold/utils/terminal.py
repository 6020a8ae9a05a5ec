"""Tables and progress bars for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


def render(table: Table) -> str:
    """A table as plain text, 160 characters wide at most, the same on every terminal."""
    console = Console(width=160, no_color=True, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def progress_bar(label: str, visible: bool) -> Progress:
    """A progress bar on standard error: steps done, time taken and left, and the task's description.

    It disappears when it is stopped.
    """
    return Progress(
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        disable=not visible,
        transient=True,
    )
