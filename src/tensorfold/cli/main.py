"""The command line: all commands in their order, and the entry point.

Results go to standard output, progress and messages to standard error. Heavy imports live inside the commands, so that
``--help`` and usage errors answer at once.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

import tensorfold
from tensorfold.cli.bench import bench
from tensorfold.cli.compress import compress
from tensorfold.cli.errors import can_be_put_right, check_encoding, explain, line
from tensorfold.cli.eval import evaluate
from tensorfold.cli.export import export
from tensorfold.cli.fold import fold
from tensorfold.cli.heal import heal
from tensorfold.cli.needs import Command
from tensorfold.cli.options import OneDevice
from tensorfold.cli.plan import plan
from tensorfold.cli.push import push
from tensorfold.cli.recipes import recipes
from tensorfold.cli.report import report
from tensorfold.cli.sample import sample

app = typer.Typer(
    name="tensorfold",
    help="Fold the weights of transformer language models into chains of small tensors.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(show: bool) -> None:
    """Print the version and exit, if asked for."""
    if show:
        typer.echo(f"tensorfold {tensorfold.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; accepted anywhere.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    """Options that stand before the command."""


app.command(cls=Command)(compress)
app.command(cls=Command)(plan)
app.command(cls=Command)(fold)
app.command("eval", cls=Command)(evaluate)
app.command(cls=Command)(heal)
app.command(cls=Command)(bench)
app.command(cls=Command)(export)
app.command(cls=Command)(sample)
app.command(cls=Command)(report)
app.command(cls=Command)(push)
app.command(cls=Command)(recipes)


@app.command(cls=Command)
def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory to write.")] = Path("tensorfold-demo"),
    device: OneDevice = None,
) -> None:
    """Compress the real SmolLM2-135M and show what it gained and what it cost. The same command resumes."""
    from tensorfold.cli.demo import run_demo

    run_demo(out, device)


def run(arguments: list[str] | None = None) -> None:
    """Run the command line, and exit.

    The exit status is 0 for success; 1 for a failure, or too little memory; 2 for bad usage, bad input or a full disk.
    An error is shown as one line on standard error, with ``--debug`` as a traceback.

    Args:
        arguments: Arguments after the program's name; those of this process if None.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    _quieten()
    try:
        check_encoding(given)
        arguments = [argument for argument in given if argument != "--debug"]
        status = app(arguments, prog_name="tensorfold", standalone_mode=False)
    except Exception as error:
        if debug:
            raise
        command = next((argument for argument in arguments or given if not argument.startswith("-")), "")
        print(f"tensorfold: {line(explain(error, command))}", file=sys.stderr)
        raise SystemExit(2 if can_be_put_right(error) else 1) from None
    raise SystemExit(status or 0)


def _quieten() -> None:
    """Silence the progress bars and notices of libraries, unless environment variables ask for them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    logging.captureWarnings(True)


if __name__ == "__main__":
    run()
