"""``tensorfold compress``: from a model to a smaller one that runs, by the other commands one after another."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tensorfold.cli.export import Bits
from tensorfold.cli.options import OWN_TEXT_HELP, TEXT_HELP, Json, Model, OneDevice
from tensorfold.cli.output import emit
from tensorfold.errors import InputError


class Engine(StrEnum):
    """What the result is for."""

    transformers = "transformers"
    onnx = "onnx"
    openvino = "openvino"


class EffortChoice(StrEnum):
    """How much time calibration takes."""

    low = "low"
    medium = "medium"
    high = "high"


def compress(
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", help="Directory of the run: folded, healed, exported, report.html, compress.json.")
    ],
    size: Annotated[
        float | None, typer.Option("--size", help="Fraction of the model's parameters that stays, 0 < size < 1.")
    ] = None,
    bytes_: Annotated[
        str | None, typer.Option("--bytes", metavar="60MB", help="Size of the result's weights, in its bits.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", help=f"What it is for; give it again for more. {OWN_TEXT_HELP} Default: self."),
    ] = None,
    unseen: Annotated[
        str | None,
        typer.Option("--unseen", help=f"Judged by as well, never calibrated on. {TEXT_HELP} Default: python-docs."),
    ] = None,
    minutes: Annotated[float, typer.Option("--minutes", min=0, help="Of healing; 0 for none.")] = 10.0,
    to: Annotated[Engine, typer.Option("--to", help="What the result is to run in.")] = Engine.transformers,
    bits: Annotated[
        Bits | None,
        typer.Option(
            "--bits",
            help="Of a stored number; for transformers 32 or 8. Default: 8, for transformers 32, or fewer where "
            "--bytes needs them.",
        ),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option("--targets", help="What is folded, as of fold. Default: every linear layer, and experts."),
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Narrow the MLPs only: a model that transformers loads without tensorfold.")
    ] = False,
    effort: Annotated[EffortChoice, typer.Option("--effort", help="How much time calibration takes.")] = (
        EffortChoice.medium
    ),
    tokens: Annotated[int, typer.Option("--tokens", min=256, help="Of text to calibrate on.")] = 24_000,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=64, help="Of each text that is judged by.")] = 8192,
    device: OneDevice = None,
    as_json: Json = False,
) -> None:
    """Make a model smaller: fold, heal, export, judge and report, beside the dense model. The same command resumes.

    Ends with a table of bytes, perplexities and speeds, and says so where fewer bits alone would have been better.
    """
    from tensorfold.cli.pipeline import Order, Pipeline
    from tensorfold.cli.texts import unseen_of

    fraction, most = size_asked("compress", size, bytes_)
    texts = tuple(text or ("self",))
    order = Order(
        model=model,
        size=fraction,
        most=most,
        texts=texts,
        unseen=unseen_of(texts, unseen),
        minutes=minutes,
        engine=to.value,
        bits=None if bits is None else int(bits.value),
        plain=plain,
        effort=effort.value,
        tokens=tokens,
        judged=max_tokens,
        targets=targets,
        device=device,
    )
    outcome = Pipeline(order, out).run()
    emit(as_json, outcome.to_dict(), outcome.__str__)


def size_asked(command: str, size: float | None, most: str | None) -> tuple[float | None, int | None]:
    """The fraction of a model's parameters, or the bytes, that are asked for; one of the two is None.

    Raises:
        InputError: Both or neither is given, or one is out of range.
    """
    from tensorfold.cli.sizes import bytes_of

    if (size is None) == (most is None):
        raise InputError(
            f"{command}: got {'both' if size is not None else 'neither'} of --size and --bytes; needed one of the two."
        )
    if size is not None and not 0 < size < 1:
        raise InputError(f"{command}: --size {size}; needed a fraction of the model's parameters, 0 < size < 1.")
    return size, None if most is None else bytes_of(most)
