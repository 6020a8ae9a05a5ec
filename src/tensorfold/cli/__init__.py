"""The command line: one file a command."""

from __future__ import annotations


def run(arguments: list[str] | None = None) -> None:
    """Run the command ``tensorfold``; see :func:`tensorfold.cli.main.run`."""
    from tensorfold.cli.main import run as run_main

    run_main(arguments)
