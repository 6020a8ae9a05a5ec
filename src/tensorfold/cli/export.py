"""``tensorfold export``: a folded model for tools that know nothing of folding."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Target(StrEnum):
    """What a model can be exported to."""

    dense = "dense"
    onnx = "onnx"
    int8 = "int8"


def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id, local directory, .gguf file, or smollm2-135m.")
    ],
    to: Annotated[
        Target,
        typer.Option(
            "--to",
            help="dense: a plain transformers directory, matrices multiplied out. onnx: a float32 graph that keeps "
            "the factors, with any batch size and length, without a KV cache. int8: still folded, every weight in "
            "eight bits with a scale a row; for inference only, and for tensorfold.load.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Directory to write; must not exist, or be empty.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")
    ] = False,
) -> None:
    """Write a model for other tools, and check that it computes the same.

    The ONNX graph has no KV cache: each call computes the logits of all positions from all tokens. Tracing it takes
    some seconds a block.
    """
    from tensorfold.hf.sources import find_model
    from tensorfold.utils.atomic_files import check_target

    check_target(out)
    if to is Target.onnx:
        from tensorfold.export.engines import check_packages

        check_packages()
    source = find_model(model)
    loaded = source.model("float32" if to is Target.onnx else None)
    tokenizer, absent = source.tokenizer_beside()

    from tensorfold.export.checkpoints import export_dense, export_int8, export_onnx

    write = {Target.dense: export_dense, Target.onnx: export_onnx, Target.int8: export_int8}[to]
    report = write(loaded, out, tokenizer, name=source.name)
    if absent is not None:
        typer.echo(f"written without a tokenizer: {absent}", err=True)
    typer.echo(json.dumps(report.to_dict()) if as_json else str(report))
