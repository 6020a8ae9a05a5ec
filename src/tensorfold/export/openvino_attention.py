"""Attention of an OpenVINO graph in the form that its runtime computes in one operation, with the cache in place.

The CPU plugin merges ``ReadValue → Gather → Concat → ScaledDotProductAttention`` into one operation that appends to its
cache; otherwise it copies all keys and values at every token. Where groups of heads share keys and values, it looks for
them to be repeated by ``Unsqueeze → Broadcast → Reshape``, and for nothing else to read what is between. Traced graphs
compute the shapes of these three from one another.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def plain_repeats(program: Any) -> int:
    """Give the repeating of keys and values constant shapes, in place; what is computed stays the same.

    Args:
        program: An ``openvino.Model``.

    Returns:
        How many inputs of attention were changed: two a layer, or none where every head has its own keys and values.
    """
    from openvino import opset13

    changed = 0
    for attention in program.get_ordered_ops():
        if attention.get_type_name() != "ScaledDotProductAttention":
            continue
        for place in (1, 2):
            repeat = _repeat(attention.input_value(place).get_node())
            if repeat is None:
                continue
            shared, groups, times, width = repeat
            apart = opset13.unsqueeze(shared, _constant(2))  # (batch, groups, 1, length, width)
            repeated = opset13.broadcast(apart, _constant([1, 1, times, 1, 1]), broadcast_spec="BIDIRECTIONAL")
            heads = opset13.reshape(repeated, _constant([0, groups * times, -1, width]), special_zero=True)
            attention.input(place).replace_source_output(heads.output(0))
            changed += 1
    program.validate_nodes_and_infer_types()
    return changed


def _constant(value: int | list[int]) -> Any:
    from openvino import opset13

    return opset13.constant(np.array(value, dtype=np.int64))


def _repeat(reshape: Any) -> tuple[Any, int, int, int] | None:
    """What heads share, ``Output`` of shape (batch, groups, length, width); groups; times each is repeated; width."""
    chain = [reshape]
    for wanted in ("Reshape", "Broadcast", "Unsqueeze"):
        if chain[-1].get_type_name() != wanted:
            return None
        chain.append(chain[-1].input_value(0).get_node())
    unsqueeze = chain[2]
    shapes = [node.output(0).get_partial_shape() for node in (unsqueeze, reshape)]
    if [len(shape) for shape in shapes] != [5, 4]:
        return None
    (_, groups, one, _, width), (_, heads, _, out_width) = shapes
    if any(size.is_dynamic for size in (groups, one, width, heads, out_width)) or one.get_length() != 1:
        return None
    groups, heads, width = (size.get_length() for size in (groups, heads, width))
    if heads % groups or out_width.get_length() != width:
        return None
    return unsqueeze.input_value(0), groups, heads // groups, width
