"""Results on standard output: one JSON object, or text for people."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import typer


def emit(as_json: bool, data: dict[str, Any], text: Callable[[], str]) -> None:
    """Print ``data`` as one line of JSON, or else the text that ``text`` makes of it."""
    typer.echo(json.dumps(data) if as_json else text())


def quietly(command: Callable[..., None], **arguments: Any) -> None:
    """Run a command with its result on nobody's standard output; what it says on standard error is shown."""
    with redirect_stdout(io.StringIO()):
        command(**arguments, as_json=True)
