"""``tensorfold export``: a folded model for tools that know nothing of folding."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tensorfold.cli.options import Json, Model
from tensorfold.cli.output import emit


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
        typer.Option("--bits", help="Of a stored weight (onnx, openvino, gguf): 32 [default], 16, 8 or (not gguf) 4."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a model for other tools, and check that it computes the same.

    One graph reads prompts and steps, with a KV cache; it is checked over 32 steps, and with rows padded on the left.
    Tracing takes some seconds a block. What was written runs in sample, eval and bench.
    """
    from tensorfold.hf.sources import find_model
    from tensorfold.utils.atomic_files import check_file_target, check_target

    (check_file_target if to is Target.gguf and out.suffix == ".gguf" else check_target)(out)
    packed = to in (Target.onnx, Target.openvino, Target.gguf)
    if packed:
        from tensorfold.export.tracing import check_packages

        check_packages(to.value)
    source = find_model(model)
    loaded = source.model("float32" if packed else None)
    tokenizer, absent = source.tokenizer_beside()

    from tensorfold.export.checkpoints import export_dense, export_int8
    from tensorfold.export.gguf_file import export_gguf
    from tensorfold.export.graphs import export_onnx, export_openvino

    if packed:
        into = {Target.onnx: export_onnx, Target.openvino: export_openvino, Target.gguf: export_gguf}[to]
        report = into(loaded, out, tokenizer, name=source.name, bits=32 if bits is None else int(bits.value))
    else:
        report = (export_dense if to is Target.dense else export_int8)(loaded, out, tokenizer, name=source.name)
    if absent is not None:
        typer.echo(f"written without a tokenizer: {absent}", err=True)
    emit(as_json, report.to_dict(), lambda: str(report))
