"""Graphs for engines: ONNX and OpenVINO files with a KV cache that keep the factors, in 32, 16, 8 or 4 bits."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tensorfold.errors import InputError
from tensorfold.export.agreement import agreement, check_close, check_finite
from tensorfold.export.balanced import in_few_bits
from tensorfold.export.descriptions import graph_readme, write_genai_config, write_openvino_tokenizer
from tensorfold.export.engine_model import FILES, file_bytes, open_exported, write_manifest
from tensorfold.export.kept_graphs import KeptGraphs, read_program
from tensorfold.export.onnx_weights import pack_onnx, stored_numbers, tidy
from tensorfold.export.openvino_weights import pack_openvino, share_tables
from tensorfold.export.tracing import check_packages, probe, trace
from tensorfold.export.written import ExportReport, check_float32, version, write_beside, writing
from tensorfold.hf.dense import plain_config
from tensorfold.models.anatomy import count_parameters
from tensorfold.models.modes import evaluation_mode
from tensorfold.utils.atomic_files import check_target
from tensorfold.utils.torch_modes import in_usual_modes

# Of logits in float32, in units of the largest where that is above 1.
TOLERANCE = 1e-3
BITS = (32, 16, 8, 4)
# Protobuf's limit is 2 GB a file, the graph itself included.
_ONE_FILE = int(1.8e9)


def export_onnx(
    model: PreTrainedModel,
    out: str | Path,
    tokenizer: Any = None,
    *,
    name: str = "the model",
    bits: int = 32,
    kept: KeptGraphs | None = None,
) -> ExportReport:
    """Write ``model`` as ``model.onnx`` with a KV cache and factors kept, beside its tokenizer; whole or not at all.

    One graph reads prompts and steps; batch size and lengths are free, and rows may be padded on the left. Inputs and
    outputs have the names that onnxruntime-genai and transformers.js look for, and ``genai_config.json`` lies beside
    it. Weights beyond the 2 GB that one ONNX file can hold go to ``model.onnx.data``.

    Args:
        model: Folded or not, in float32 on the CPU; stays as it is.
        out: Directory to write; must not exist, or be empty.
        tokenizer: Written beside the graph.
        name: What its README calls the model.
        bits: Of a stored weight. 16: float16, computed with in float32. 8 and 4: ``MatMulNBits`` of ONNX Runtime, in
            groups of 32 along the inputs, a last group that is shorter filled up; tables and heads in 8 at least.
        kept: Where graphs of several exports of the model are kept; None to trace it anew.

    Raises:
        InputError: A package is missing, ``out`` cannot be written, or the model is not in float32 or of a kind that
            no graph with a cache can be made of.
        TensorfoldError: The model cannot be traced, the graph in float32 does not give its logits to 1e-3 (of the
            largest where that is above 1) over 32 steps with its cache and padded rows, these are not finite, or the
            files cannot be written.
    """
    return _export("onnx", model, out, tokenizer, name, bits, kept=kept)


def export_openvino(
    model: PreTrainedModel,
    out: str | Path,
    tokenizer: Any = None,
    *,
    name: str = "the model",
    bits: int = 32,
    windows: Tensor | None = None,
    kept: KeptGraphs | None = None,
) -> ExportReport:
    """Write ``model`` as ``openvino_model.xml`` and ``.bin``, its KV cache a state of the graph; whole or not at all.

    Args:
        model, out, tokenizer, name, kept: As for :func:`export_onnx`. Where ``openvino_tokenizers`` is installed the
            tokenizer is written as OpenVINO GenAI reads it, too.
        bits: Of a stored weight. 16: float16. 8 and 4: weights alone, by NNCF; in 4 bits in groups of 32 along the
            inputs, or of 16 where 32 does not divide them; a matrix that neither divides has 8, as tables and heads do.
        windows: Calibration text for 4 bits, token ids of shape (windows, length): see
            :func:`.openvino_weights.pack_openvino`.

    Raises:
        InputError: As for :func:`export_onnx`; or ``windows`` with other bits than 4, where they have no effect.
        TensorfoldError: As for :func:`export_onnx`.
    """
    if windows is not None and bits != 4:
        raise InputError(f"export --to openvino: calibration text has no effect in {bits} bits; give bits=4, or none.")
    return _export("openvino", model, out, tokenizer, name, bits, windows, kept)


@in_usual_modes
def _export(
    to: str,
    model: PreTrainedModel,
    out: str | Path,
    tokenizer: Any,
    name: str,
    bits: int,
    windows: Tensor | None = None,
    kept: KeptGraphs | None = None,
) -> ExportReport:
    started = time.monotonic()
    if bits not in BITS:
        raise InputError(f"export --to {to}: got bits={bits}; needed one of {', '.join(map(str, BITS))}.")
    check_packages(to)
    check_target(Path(out))  # tracing takes minutes
    check_float32(model, to)
    program: Any = None
    with evaluation_mode(model), writing(out) as partial:
        parameters = count_parameters(model)
        plain_config(model).save_pretrained(partial)
        manifest: dict[str, Any] = {"engine": to, "bits": 32, "parameters": parameters, "tensorfold": version()}
        whole = partial if kept is None or bits == 32 else kept.place(model, to, bits, fitted=windows is not None)
        if whole is partial or not whole.exists():
            _check_finite(model, to)
            with in_few_bits(model, to, bits, fitted=windows is not None):
                program = _save(to, trace(model, to), partial, manifest)
                found = agreement(open_exported(partial), model, to)
            check_close(to, found.difference, TOLERANCE * max(1.0, found.largest))
            if whole is not partial:
                KeptGraphs.keep(partial, whole, to)
        if bits != 32:
            program = None  # its weights are read again: files do not depend on who traced
            manifest["bits"] = bits
            program = _save(to, read_program(whole, to), partial, manifest, windows)
            found = agreement(open_exported(partial), model, to)
        stored = stored_numbers(program) if to == "onnx" else pack_openvino(program, 32)[1]
        size = file_bytes(partial, to)
        report = ExportReport(
            to, str(out), parameters, size, found.difference, 0.0, bits, found.steps,
            f"{found.same} of {found.compared}", stored,
        )  # fmt: skip
        with suppress(ValueError):  # settings that contradict each other stay with the model they came with
            model.generation_config.save_pretrained(partial)
        if to == "onnx":
            beside = write_genai_config(partial, model, {value.name: value.shape for value in program.graph.inputs})
        else:
            beside = write_openvino_tokenizer(partial, tokenizer)
        manifest.update(difference=found.difference, same_tokens=report.same_tokens, stored=stored)
        write_manifest(partial, manifest)
        write_beside(partial, model, tokenizer, graph_readme(name, report, beside))
    seconds = round(time.monotonic() - started, 3)
    return ExportReport(**{**report.to_dict(), "seconds": seconds})


@torch.no_grad()
def _check_finite(model: PreTrainedModel, to: str) -> None:
    ids, mask = probe(model, 2, 16)
    check_finite(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, to, "the model's own")


def _save(to: str, program: Any, directory: Path, manifest: dict[str, Any], windows: Tensor | None = None) -> Any:
    """Write the program in the manifest's bits, over what is there; in less than 32 the program is changed.

    Returns:
        The program as it was written.
    """
    for file in directory.glob(f"{FILES[to].split('.')[0]}.*"):
        file.unlink()
    path = directory / FILES[to]
    if to == "openvino":
        import openvino

        share_tables(program)
        program = pack_openvino(program, manifest["bits"], windows)[0]
        openvino.save_model(program, str(path), compress_to_fp16=False)
    else:
        import onnx_ir

        tidy(program)
        pack_onnx(program, manifest["bits"])
        size = sum(value.const_value.nbytes for value in program.graph.initializers.values())
        onnx_ir.save(program, path, external_data="model.onnx.data" if size > _ONE_FILE else None)
    write_manifest(directory, manifest)
    return program
