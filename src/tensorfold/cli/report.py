"""``tensorfold report``: one HTML page about model directories."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tensorfold.cli.options import Device, Dtype, Json
from tensorfold.cli.output import emit


def report(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folded or healed models, and the dense one to compare with.")
    ],
    out: Annotated[Path, typer.Option("--out", help="HTML file to write; one that is there is replaced.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Prompt of every model's sample. Default: Once upon a time.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Most new tokens in a sample.")] = 48,
    samples: Annotated[
        bool, typer.Option("--samples/--no-samples", help="Whether to show samples; without them no model is loaded.")
    ] = True,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page: sizes, perplexities, errors, spectra, losses, samples.

    Perplexities are those that `tensorfold eval DIR --text TEXT --record` recorded in the directories.
    """
    from tensorfold.report.page import PROMPT, write_report

    used = (PROMPT if prompt is None else prompt) if samples else None
    kind = None if dtype is None else dtype.value
    write_report(directories, out, prompt=used, tokens=tokens, progress=sys.stderr.isatty(), dtype=kind, device=device)
    size = out.stat().st_size
    found = {"out": str(out), "models": [str(path) for path in directories], "bytes": size}
    emit(as_json, found, lambda: f"written to {out} ({size / 1e6:.1f} MB)")
