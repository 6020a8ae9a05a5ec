"""``tensorfold bench``: how fast and how large a folded model is, beside what it could be instead."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from tensorfold.errors import InputError


class WayChoice(StrEnum):
    """How every folded layer is to be applied."""

    chain = "chain"
    materialise = "materialise"


class DtypeChoice(StrEnum):
    """Types that weights can be converted to."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


def bench(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id, local directory, .gguf file, or smollm2-135m.")
    ],
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="MODEL", help="The dense model. Default: MODEL itself, multiplied out."),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", help="Numbers of tokens for single layers [1,16,128,1024,4096].")
    ] = None,
    prefill: Annotated[
        int | None,
        typer.Option("--prefill", min=1, help="Tokens of the prompt [512, or what the context has room for]."),
    ] = None,
    decode: Annotated[int | None, typer.Option("--decode", min=1, help="Tokens generated after it [32].")] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="Samples of everything [7].")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Default: torch's own choice.")] = None,
    dtype: Annotated[DtypeChoice | None, typer.Option("--dtype", help="Of the weights. Default: as stored.")] = None,
    way: Annotated[
        WayChoice | None,
        typer.Option("--way", help="Apply folded layers so. Default: what each chooses by the number of tokens."),
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Measure peak memory, of whole models in processes of its own.")
    ] = True,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw speed-up against number of tokens to this .svg, .png or .pdf.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")
    ] = False,
) -> None:
    """Measure speed and memory beside the dense model, the matrix built in every forward, and other libraries.

    Times mean something on a machine that does nothing else; ratios, of runs taken in turn, suffer less.
    """
    given: dict[str, Any] = {
        "tokens": None if tokens is None else _numbers(tokens),
        "prefill": prefill,
        "decode": decode,
        "rounds": rounds,
        "threads": threads,
        "dtype": None if dtype is None else dtype.value,
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
    typer.echo(json.dumps(report.to_dict()) if as_json else str(report))


def _check_folded(model: str) -> None:
    """Raise :class:`InputError` for a model without folded layers, by its configuration."""
    from tensorfold.hf.sources import find_model

    if getattr(find_model(model).config(), "quantization_config", None) is None:
        raise InputError(f"bench: {model} has no folded layers whose speed could be drawn; leave --plot out.")


def _numbers(text: str) -> tuple[int, ...]:
    """``1,16,128`` as numbers.

    Raises:
        InputError: It is no such list.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise InputError(f"bench: --tokens {text!r}; needed whole numbers of at least 1, such as 1,16,128.")
    return tuple(int(part) for part in parts)
