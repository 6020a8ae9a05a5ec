"""Results on standard output: one JSON object, or text for people."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import typer


def emit(as_json: bool, data: dict[str, Any], text: Callable[[], str]) -> None:
    """Print ``data`` as one line of JSON, or else the text that ``text`` makes of it."""
    typer.echo(json.dumps(data) if as_json else text())
