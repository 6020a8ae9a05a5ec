"""``tensorfold export``: a folded model for tools that know nothing of folding."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorfold.cli.options import Dtype, Json, Model, OneDevice
from tensorfold.cli.output import emit

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from tensorfold.export.kept_graphs import KeptGraphs
    from tensorfold.export.written import ExportReport

_TOKENS, _WINDOW = 8192, 256  # of calibration text, and of its windows at most


class Target(StrEnum):
    """What a model can be exported to."""

    dense = "dense"
    onnx = "onnx"
    openvino = "openvino"
    gguf = "gguf"
    int8 = "int8"


class Bits(StrEnum):
    """How many bits a stored weight of a graph or a GGUF file may have."""

    float32 = "32"
    float16 = "16"
    int8 = "8"
    int4 = "4"


def export(
    model: Model,
    to: Annotated[
        Target,
        typer.Option(
            "--to",
            help="dense: a plain transformers directory, matrices multiplied out. onnx, openvino: a graph that "
            "keeps the factors, with a KV cache and any batch size and length. gguf: a file for llama.cpp, of a model "
            "without factors shaped as Llama, Qwen2 or GPT-2. int8: still folded, every weight in "
            "eight bits with a scale a row; for inference only, and for tensorfold.load.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            help="Directory to write; must not exist, or be empty. With --to gguf a name in .gguf is the file's.",
        ),
    ],
    bits: Annotated[
        Bits | None,
        typer.Option("--bits", help="Of a stored weight (onnx, openvino, gguf): 32, 16, 8 or 4. Default: 32."),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            "--calibrate",
            metavar="TEXT",
            help="With --to openvino --bits 4: text whose activations the weights' scales are fitted to, as of fold; "
            "'self' is text that the model writes.",
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=2, help="How many tokens of it. Default: 8,192.")
    ] = None,
    dtype: Dtype = None,
    device: OneDevice = None,
    as_json: Json = False,
) -> None:
    """Write a model for other tools, and check that it computes the same.

    One graph reads prompts and steps, with a KV cache; it is checked over 32 steps, and with rows padded on the left.
    Tracing takes some seconds a block. What was written runs in sample, eval and bench.
    """
    report = export_model(
        model, to, out, bits, calibrate=calibrate, tokens=tokens, dtype=dtype and dtype.value, device=device
    )
    emit(as_json, report.to_dict(), lambda: str(report))


def export_model(
    model: str,
    to: Target,
    out: Path,
    bits: Bits | None,
    *,
    calibrate: str | None = None,
    tokens: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    kept: KeptGraphs | None = None,
) -> ExportReport:
    """Check what can be checked, load the model, and write it; the arguments are the command's.

    Args:
        kept: Where graphs of several exports of the model are kept.
    """
    from tensorfold.calibration.own_text import check_named
    from tensorfold.hf.sources import find_model
    from tensorfold.utils.atomic_files import check_file_target, check_target
    from tensorfold.utils.devices import one_device

    check_named(calibrate or (), "validation")
    one_device(device, "an export is written by one device")
    (check_file_target if to is Target.gguf and out.suffix == ".gguf" else check_target)(out)
    packed = to in (Target.onnx, Target.openvino, Target.gguf)
    if packed:
        from tensorfold.export.tracing import check_packages

        check_packages(to.value)
    source = find_model(model)
    loaded = source.model("float32" if packed else dtype, device)
    tokenizer, absent = source.tokenizer_beside()

    from tensorfold.export.checkpoints import export_dense, export_int8
    from tensorfold.export.gguf_file import export_gguf
    from tensorfold.export.graphs import export_onnx, export_openvino

    if packed:
        into = {Target.onnx: export_onnx, Target.openvino: export_openvino, Target.gguf: export_gguf}[to]
        options: dict[str, Any] = {"name": source.name, "bits": 32 if bits is None else int(bits.value)}
        if calibrate is not None:
            options["windows"] = _windows(calibrate, tokens or _TOKENS, loaded, source.tokenizer())
        if kept is not None:
            options["kept"] = kept
        report = into(loaded, out, tokenizer, **options)
    else:
        report = (export_dense if to is Target.dense else export_int8)(loaded, out, tokenizer, name=source.name)
    if absent is not None:
        typer.echo(f"written without a tokenizer: {absent}", err=True)
    return report


def _windows(text: str, tokens: int, model: PreTrainedModel, tokenizer: Any) -> Tensor:
    """Calibration windows of a text, token ids of shape (windows, length)."""
    from tensorfold.calibration.own_text import documents_of
    from tensorfold.calibration.windows import calibration_windows
    from tensorfold.data.tokens import check_ids

    documents = documents_of(text, model, tokenizer, tokens, split="validation", progress=sys.stderr.isatty())
    windows = calibration_windows(tokenizer, documents, tokens, _WINDOW)
    check_ids(model, windows, "calibration", tokenizer)
    return windows
