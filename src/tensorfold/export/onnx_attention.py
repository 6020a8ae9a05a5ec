"""Operations of an ONNX graph merged into those of opset 23: norms, rotary positions, attention with its cache.

ONNX Runtime takes an operation of a single token longer to start than to compute, and a traced block has seventy. Those
that are merged here also need no copy of the keys and values of earlier tokens for every head that shares them.
"""

from __future__ import annotations

from typing import Any

OPSET = 23  # the first with Attention, RotaryEmbedding and RMSNormalization


def merge_operations(program: Any) -> int:
    """Merge what can be merged in an ``onnx_ir.Model`` of opset 23, in place.

    Norms and rotary positions are found by ``onnxscript``; attention was exported as one operation already, to which
    the cache is given here: ``Concat(past, new)``, repeated for the heads that share it, becomes ``past`` and ``new``.

    Returns:
        How many attentions were given their cache.
    """
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass
    from onnxscript.rewriter import onnx_fusions

    onnx_fusions.fuse(program)
    attentions = [node for node in program.graph.all_nodes() if node.op_type == "Attention"]
    merged = sum(_give_cache(node) for node in attentions)
    program.graph.sort()
    RemoveUnusedNodesPass()(program)
    CommonSubexpressionEliminationPass()(program)
    return merged


def _give_cache(node: Any) -> bool:
    """Let an attention append to the cache itself; False where its keys or values are not made of one."""
    import onnx_ir

    query, key, value = node.inputs[:3]
    heads = query.shape[1] if query.shape is not None and len(query.shape) == 4 else None
    joins = [_join(each, heads) for each in (key, value)]
    if len(node.inputs) > 4 or isinstance(heads, str) or heads is None or None in joins:
        return False
    past, new = zip(*(join.inputs for join in joins), strict=True)  # type: ignore[union-attr]
    mask = node.inputs[3] if len(node.inputs) == 4 else None
    whole = onnx_ir.Node(
        "", "Attention", [query, *new, mask, *past], node.attributes.values(), num_outputs=3, name=node.name
    )
    node.graph.insert_after(node, whole)
    for old, out in zip([node.outputs[0], *(join.outputs[0] for join in joins)], whole.outputs, strict=True):  # type: ignore[union-attr]
        out.shape, out.type = old.shape, old.type
        name, old.name = old.name, f"{old.name}_before"
        onnx_ir.convenience.replace_all_uses_with(old, out, replace_graph_outputs=True)
        out.name = name
    node.graph.remove(node, safe=True)
    return True


def _join(value: Any, heads: Any) -> Any:
    """The ``Concat`` of cached and new keys or values, (batch, groups, length, width); None where there is none."""
    node = value.producer()
    if node is not None and node.op_type == "Reshape":  # each group of heads, repeated
        chain = [node]
        for wanted in ("Expand", "Unsqueeze"):
            before = chain[-1].inputs[0].producer()
            if before is None or before.op_type != wanted:
                return None
            chain.append(before)
        axes = chain[-1].inputs[1].const_value
        if axes is None or axes.numpy().reshape(-1).tolist() != [2]:
            return None
        node = chain[-1].inputs[0].producer()
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2:
        return None
    shape, past = node.outputs[0].shape, node.inputs[0]
    if shape is None or len(shape) != 4 or node.attributes["axis"].as_int() not in (2, -2) or not past.is_graph_input():
        return None
    groups = shape[1]
    return node if isinstance(groups, int) and isinstance(heads, int) and heads % groups == 0 else None
