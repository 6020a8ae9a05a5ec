"""Weights of an OpenVINO graph: held once where table and head share them, and in fewer bits."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import numpy as np
from torch import Tensor

GROUP = 32
_SMALLEST_GROUP = 16
_KINDS = {"f32": "float32", "f16": "float16", "i8": "int8", "u8": "int8", "i4": "int4", "u4": "int4"}


def share_tables(program: Any) -> None:
    """Let tables read their rows from the constants of heads that are tied to them.

    The converter turns, reshapes and fills up the cores of a folded head while it converts, which makes constants of
    their own. Where such a constant has a core's numbers in the order of the table's, as those of low rank and the
    outer ones of products have, the table's is dropped. Turned cores stay: an engine would turn them back every time.

    Args:
        program: An ``openvino.Model`` in float32; changed.
    """
    constants = [node for node in program.get_ordered_ops() if node.get_type_name() == "Constant"]
    heads = [node for node in constants if _is_read_by(node, "MatMul") and len(node.get_output_shape(0)) == 2]
    for table in constants:
        if not _is_read_by(table, "Gather") or len(table.get_output_shape(0)) < 3:
            continue  # a dense table is tied as it is
        rows = table.get_data().reshape(table.get_output_shape(0)[0], -1)  # (v, k)
        for head in heads:
            if _holds(head.get_data(), rows):
                for port in list(table.output(0).get_target_inputs()):
                    _gather_from(head, port.get_node(), table.get_output_shape(0))
                break
    program.validate_nodes_and_infer_types()


def _is_read_by(constant: Any, kind: str) -> bool:
    """Whether nodes of one kind alone read a float32 constant, and there are some."""
    readers = {port.get_node().get_type_name() for port in constant.output(0).get_target_inputs()}
    return readers == {kind} and constant.get_element_type().get_type_name() == "f32"


def _holds(head: np.ndarray, rows: np.ndarray) -> bool:
    """Whether a head's constant (p, q) has the rows (v, k) one after another, each perhaps with zeros behind it."""
    if head.size == rows.size:
        return bool((head.reshape(rows.shape) == rows).all())
    wider = len(head) == len(rows) and head.shape[1] > rows.shape[1]
    return wider and bool((head[:, : rows.shape[1]] == rows).all() and not head[:, rows.shape[1] :].any())


def _gather_from(head: Any, gather: Any, shape: Any) -> None:
    """Replace what ``gather`` reads from a table (v, …) of ``shape`` by what it reads from a head's constant (p, q)."""
    from openvino import opset13 as operators

    def whole(*values: int) -> Any:
        return operators.constant(list(values), dtype=np.int64)

    count, *rest = shape
    width, indices = int(np.prod(rest)), gather.input_value(1)
    rows, columns = head.get_output_shape(0)
    data = head if rows == count else operators.reshape(head, whole(count, width), False)
    taken = operators.gather(data, indices, operators.constant(0, dtype=np.int64))  # (…, width or more)
    batch = indices.get_partial_shape().rank.get_length()
    if rows == count and columns > width:
        taken = operators.slice(taken, whole(0), whole(width), whole(1), whole(batch))
    gather.output(0).replace(operators.reshape(taken, whole(*[0] * batch, *rest), True).output(0))


def pack_openvino(program: Any, bits: int, windows: Tensor | None = None) -> tuple[Any, dict[str, int]]:
    """The program with its weights in ``bits``, and how many numbers it stores by type.

    Args:
        program: An ``openvino.Model`` in float32; changed unless ``bits`` is 32.
        bits: 32, 16 (float16), 8 (a scale a row), or 4 (one a group of 32, or of 16 where 32 does not divide the
            inputs; a matrix that neither divides, tables and heads in 8).
        windows: Calibration text, token ids of shape (windows, length): scales in 4 bits then are those that change
            the products with its activations least (NNCF's scale estimation) instead of each group's largest number.
    """
    if bits == 16:
        from openvino._offline_transformations import compress_model_transformation

        compress_model_transformation(program)
    elif bits in (8, 4):
        import nncf
        from nncf.quantization.advanced_parameters import GroupSizeFallbackMode

        settings: dict[str, Any] = {"mode": nncf.CompressWeightsMode.INT8_SYM}
        if bits == 4:
            fallback = nncf.AdvancedCompressionParameters(
                group_size_fallback_mode=GroupSizeFallbackMode.ADJUST, min_adjusted_group_size=_SMALLEST_GROUP
            )
            settings = {
                "mode": nncf.CompressWeightsMode.INT4_SYM,
                "group_size": GROUP,
                "ratio": 1.0,
                "backup_mode": nncf.BackupMode.INT8_SYM,
                "advanced_parameters": fallback,
            }
            if windows is not None:
                settings |= {"dataset": nncf.Dataset(_feeds(program, windows)), "scale_estimation": True}
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                program = nncf.compress_weights(program, **settings)
        finally:
            logging.disable(level)
    return program, _stored(program)


def _feeds(program: Any, windows: Tensor) -> list[dict[str, np.ndarray]]:
    """The program's inputs for each window, read as a prompt of one row."""
    names = {port.get_any_name() for port in program.inputs}
    feeds = []
    for window in windows.numpy():
        length = len(window)
        feed = {
            "input_ids": window[None].astype(np.int64),
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(length, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        feeds.append({name: value for name, value in feed.items() if name in names})
    return feeds


def _stored(program: Any) -> dict[str, int]:
    numbers: Counter[str] = Counter()
    for node in program.get_ops():
        if node.get_type_name() == "Constant":
            kind = _KINDS.get(node.get_element_type().get_type_name())
            if kind:
                count = 1
                for length in node.get_output_shape(0):
                    count *= length
                numbers[kind] += count
    return {kind: numbers[kind] for kind in dict.fromkeys(_KINDS.values()) if numbers[kind]}
