"""``tensorfold bench``: time and memory of a folded model beside the dense model and other libraries."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from tensorfold.cli.options import Dtype, Json, Model, OneDevice
from tensorfold.cli.output import emit
from tensorfold.errors import InputError


class WayChoice(StrEnum):
    """Ways to apply a folded layer: along the chain of its cores, or as the dense matrix built from them."""

    chain = "chain"
    materialise = "materialise"


def bench(
    model: Model,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="MODEL", help="The dense model. Default: MODEL itself, multiplied out."),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            "--tokens", help="Numbers of tokens at which single layers are timed. Default: 1,16,128,1024,4096."
        ),
    ] = None,
    prefill: Annotated[
        int | None,
        typer.Option("--prefill", min=1, help="Tokens of the prompt. Default: 512, or what the context has room for."),
    ] = None,
    decode: Annotated[
        int | None, typer.Option("--decode", min=1, help="Tokens generated after the prompt. Default: 32.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=1, help="Measurements of everything, taken in turn. Default: 7.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads of torch. Default: its own choice.")
    ] = None,
    dtype: Dtype = None,
    device: OneDevice = None,
    way: Annotated[
        WayChoice | None,
        typer.Option("--way", help="How to apply folded layers. Default: what each chooses by the number of tokens."),
    ] = None,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory/--no-memory", help="Measure peak memory as well, of each whole model in a process of its own."
        ),
    ] = True,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw speed-up against number of tokens to this .svg, .png or .pdf.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure time and memory beside the dense model, the matrix built in every forward pass, and other libraries.

    Take times on a machine that does nothing else; ratios are less sensitive, since measurements are taken in turn.
    """
    given: dict[str, Any] = {
        "tokens": None if tokens is None else _numbers(tokens),
        "prefill": prefill,
        "decode": decode,
        "rounds": rounds,
        "threads": threads,
        "dtype": None if dtype is None else dtype.value,
        "device": device,
        "way": None if way is None else way.value,
        "memory": memory,
    }

    from tensorfold.recipes.settings import BenchSettings

    settings = BenchSettings(**{key: value for key, value in given.items() if value is not None})
    if plot is not None:
        from tensorfold.benchmark.plot import check_plot

        check_plot(plot)
        _check_folded(model)

    from tensorfold.benchmark.run import bench as measure

    report = measure(model, against, settings=settings, progress=sys.stderr.isatty())
    if plot is not None:
        from tensorfold.benchmark.plot import draw

        draw(report, plot)
    emit(as_json, report.to_dict(), report.__str__)


def _check_folded(model: str) -> None:
    """Raise :class:`InputError` for a model whose configuration names no folded layers."""
    from tensorfold.hf.sources import find_model

    if getattr(find_model(model).config(), "quantization_config", None) is None:
        raise InputError(f"bench: {model} has no folded layers whose speed could be drawn; leave --plot out.")


def _numbers(text: str) -> tuple[int, ...]:
    """The whole numbers in a list such as ``1,16,128``.

    Raises:
        InputError: An entry is no whole number of at least 1.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise InputError(f"bench: --tokens {text!r}; needed whole numbers of at least 1, such as 1,16,128.")
    return tuple(int(part) for part in parts)
