"""Graphs in float32 that several exports of one model are made from, so that it is traced once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tensorfold.export.engine_model import FILES, WEIGHTS
from tensorfold.nn import FoldedModule
from tensorfold.utils.fingerprints import hash_json, hash_model


class KeptGraphs:
    """A directory of traced and checked graphs for as long as the ``with`` block lasts.

    Tracing takes most of an export: some two seconds a block. What an earlier process left there is removed.

    Args:
        directory: Where they are kept; made when the first is. It takes four bytes a parameter.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __enter__(self) -> KeptGraphs:
        shutil.rmtree(self.directory, ignore_errors=True)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def place(self, model: PreTrainedModel, to: str, bits: int, fitted: bool = False) -> Path:
        """Directory of the graph that a file for engine ``to`` in ``bits`` is made from; it may not be there yet.

        Args:
            model: Where it is folded, its factors are made ready for the bits before they are traced.
            to: Engine.
            bits: Of a stored weight.
            fitted: Whether scales are fitted to a text.
        """
        folded = any(isinstance(module, FoldedModule) for module in model.modules())
        return self.directory / hash_json([hash_model(model), to, *([bits, fitted] if folded else [])])

    @staticmethod
    def keep(written: Path, place: Path, to: str) -> None:
        """Move the graph of a directory to its place. Readers of ONNX refuse weights that have a second name."""
        partial = place.with_suffix(".partial")
        partial.mkdir(parents=True)
        for file in written.glob(WEIGHTS[to]):
            shutil.move(file, partial / file.name)
        partial.rename(place)


def read_program(directory: Path, to: str) -> Any:
    """The program of an engine that a directory holds, its weights in memory.

    Returns:
        An ``openvino.Model``, or an ``onnx_ir.Model``.
    """
    path = directory / FILES[to]
    if to == "openvino":
        import openvino

        core = openvino.Core()
        core.set_property({"ENABLE_MMAP": False})  # the files are replaced while the program is in use
        return core.read_model(path)
    import onnx_ir

    program = onnx_ir.load(path)
    onnx_ir.external_data.load_to_model(program)
    return program
