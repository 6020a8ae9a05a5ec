"""Weights of an OpenVINO graph in fewer bits."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

GROUP = 32
_SMALLEST_GROUP = 16
_KINDS = {"f32": "float32", "f16": "float16", "i8": "int8", "u8": "int8", "i4": "int4", "u4": "int4"}


def pack_openvino(program: Any, bits: int) -> tuple[Any, dict[str, int]]:
    """The program with its weights in ``bits``, and how many numbers it stores by type.

    Args:
        program: An ``openvino.Model`` in float32; changed unless ``bits`` is 32.
        bits: 32, 16 (float16), 8 (a scale a row), or 4 (one a group of 32, or of 16 where 32 does not divide the
            inputs; a matrix that neither divides, tables and heads in 8).
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
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                program = nncf.compress_weights(program, **settings)
        finally:
            logging.disable(level)
    return program, _stored(program)


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
