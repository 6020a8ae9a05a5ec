"""Weights of an ONNX graph: constants in the form that products read them in, and in fewer bits.

Notation: a product x W has W (K, N), inputs first. ``MatMulNBits`` stores it as (N, groups of K, bytes of a group), in
which form a table of N rows is gathered too: so that a tied head and its table are one constant.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

GROUP = 32
# Smaller constants are norms, biases and shapes: their bytes do not matter, and their precision does.
_SMALLEST = 1024
_DOMAIN = "com.microsoft"
_SCALES = "_scales"


def tidy(program: Any) -> None:
    """Fold turns and reshapes of constants that nothing else reads, and write ``Gemm`` as a product and a sum.

    Args:
        program: An ``onnx_ir.Model``; changed.
    """
    for node in list(program.graph):
        if node.op_type == "Gemm" and _float(node.inputs[1]) and _plain_gemm(node):
            _product_of_gemm(program.graph, node)
    for node in list(program.graph):
        source: Any = node.inputs[0] if node.inputs else None
        if node.op_type not in ("Transpose", "Reshape", "Pad") or not _float(source) or len(source.uses()) != 1:
            continue
        array = _turned(node, source.const_value.numpy())
        if array is None:
            continue
        _replace(program.graph, node, _constant(program.graph, node.outputs[0].name, np.ascontiguousarray(array)))
        program.graph.initializers.pop(source.name, None)


def _turned(node: Any, array: np.ndarray) -> np.ndarray | None:
    """What ``node`` makes of a constant; None where it is not known before the graph runs."""
    import onnx_ir

    if node.op_type == "Transpose":
        return np.transpose(array, node.attributes["perm"].as_ints() if "perm" in node.attributes else None)
    values = [onnx_ir.convenience.get_const_tensor(value) for value in node.inputs[1:3]]
    if any(value is None for value in values):
        return None
    first = [int(value) for value in values[0].numpy()]  # type: ignore[union-attr]
    if node.op_type == "Reshape":
        return array.reshape([array.shape[axis] if length == 0 else length for axis, length in enumerate(first)])
    if min(first) < 0 or len(first) != 2 * array.ndim or (len(values) > 1 and values[1].numpy().item() != 0):  # type: ignore[union-attr]
        return None
    return np.pad(array, list(zip(first[: array.ndim], first[array.ndim :], strict=True)))


def pack_onnx(program: Any, bits: int) -> None:
    """Store the weights in ``bits``: 32 as they are, 16 as float16, 8 or 4 in groups of 32 along the inputs.

    A last group that is shorter is filled up with zeros. Tables and heads have 8 bits at least; what is no factor of a
    plain product (cores of three and more axes, small matrices) is in float16.

    Args:
        program: An ``onnx_ir.Model`` in float32, :func:`tidy`; changed unless ``bits`` is 32.
    """
    if bits == 32:
        return
    if bits < 16:
        program.graph.opset_imports[_DOMAIN] = 1
        _pack_products(program.graph, bits)
    _halve(program.graph)


def stored_numbers(program: Any) -> dict[str, int]:
    """How many numbers of weights a graph stores by type."""
    numbers: Counter[str] = Counter()
    packed: dict[str, int] = {}
    for node in program.graph:
        if node.op_type == "MatMulNBits":
            packed[node.inputs[1].name] = node.attributes["bits"].as_int()
        elif node.op_type == "Gather" and node.inputs[0].name.endswith("_int8"):
            packed[node.inputs[0].name] = 8
    for name, value in program.graph.initializers.items():
        kind = value.const_value.dtype.name
        if name in packed:
            numbers[f"int{packed[name]}"] += value.const_value.size * 8 // packed[name]
        elif kind in ("FLOAT", "FLOAT16"):
            numbers["float32" if kind == "FLOAT" else "float16"] += value.const_value.size
    return {kind: numbers[kind] for kind in ("float32", "float16", "int8", "int4") if numbers[kind]}


def _plain_gemm(node: Any) -> bool:
    flags = {name: attribute.value for name, attribute in node.attributes.items()}
    return flags.get("alpha", 1.0) == 1.0 and flags.get("beta", 1.0) == 1.0 and not flags.get("transA", 0)


def _product_of_gemm(graph: Any, node: Any) -> None:
    """``Gemm(x, W, b)`` as a turn of W, ``MatMul`` and ``Add``, which read any number of axes."""
    import onnx_ir

    weight, result = node.inputs[1], node.outputs[0]
    new = []
    if "transB" in node.attributes and node.attributes["transB"].as_int():
        new.append(onnx_ir.node("Transpose", [weight], {"perm": [1, 0]}))
        new[0].outputs[0].name = f"{result.name}_weight"
        weight = new[0].outputs[0]
    new.append(onnx_ir.node("MatMul", [node.inputs[0], weight]))
    new[-1].outputs[0].name = f"{result.name}_product"
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        new.append(onnx_ir.node("Add", [new[-1].outputs[0], node.inputs[2]]))
    _substitute(graph, node, new)


def _pack_products(graph: Any, bits: int) -> None:
    tables: dict[str, list[Any]] = {}
    for node in graph:
        if node.op_type == "Gather" and _large(node.inputs[0]) and _axis(node) == 0:
            tables.setdefault(node.inputs[0].name, []).append(node)
    heads = {value.name for value in graph.outputs}
    packed: dict[str, tuple[Any, Any]] = {}
    for node in list(graph):
        if node.op_type != "MatMul":
            continue
        weight, turned = _weight_of(node)
        if weight is None:
            continue
        last = node.outputs[0].name in heads
        array = weight.const_value.numpy().T if turned else weight.const_value.numpy()
        width = 8 if last or weight.name in tables else bits
        if weight.name not in packed:
            packed[weight.name] = _packed(graph, weight.name, array, width)
        data, scales = packed[weight.name]
        inputs, outputs = array.shape
        _substitute(graph, node, [_nbits(node.inputs[0], data, scales, inputs, outputs, width)])
    for name, nodes in tables.items():
        table = graph.initializers[name]
        array = table.const_value.numpy()
        if array.shape[1] % GROUP:  # rows are read as they lie, without filling
            continue
        data, scales = packed.get(name) or _packed(graph, name, array.T, 8)
        for node in nodes:
            _gather(graph, node, data, scales, array.shape[1])
    _drop_unread(graph)


def _weight_of(node: Any) -> tuple[Any, bool]:
    """The constant that a product reads as its second factor, and whether it reads it turned; None if it has none."""
    value = node.inputs[1]
    if _large(value):
        return value, False
    before = value.producer()
    if before is not None and before.op_type == "Transpose" and _large(before.inputs[0]):
        return before.inputs[0], True
    return None, False


def _packed(graph: Any, name: str, array: np.ndarray, bits: int) -> tuple[Any, Any]:
    """(N, groups, bytes) in whole numbers and scales (N, groups) of a matrix (K, N), rounded by ONNX Runtime."""
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    config = DefaultWeightOnlyQuantConfig(block_size=GROUP, is_symmetric=True, bits=bits)
    data, scales, _ = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(array))
    return _constant(graph, f"{name}_int{bits}", data), _constant(graph, name + _SCALES, scales)


def _nbits(x: Any, data: Any, scales: Any, inputs: int, outputs: int, bits: int) -> Any:
    import onnx_ir

    attributes = {"K": inputs, "N": outputs, "bits": bits, "block_size": GROUP, "accuracy_level": 4}
    return onnx_ir.node("MatMulNBits", [x, data, scales], attributes, domain=_DOMAIN)


def _gather(graph: Any, node: Any, data: Any, scales: Any, width: int) -> None:
    """Rows of a table as (…, groups, 32) in whole numbers, less 128, times their scales.

    In operators of ONNX alone: ``GatherBlockQuantized`` is not in the build of ONNX Runtime that transformers.js loads.
    """
    import onnx_ir

    name, ids = node.outputs[0].name, node.inputs[1]

    def constant(what: str, value: Any, kind: type) -> Any:
        return _constant(graph, f"{name}_{what}", np.array(value, dtype=kind))

    new: list[Any] = []

    def add(operator: str, *inputs: Any, **attributes: Any) -> Any:
        new.append(onnx_ir.node(operator, list(inputs), attributes))
        new[-1].outputs[0].name = f"{name}_{operator.lower()}_{len(new)}"
        return new[-1].outputs[0]

    whole = add("Cast", add("Gather", data, ids, axis=0), to=int(onnx_ir.DataType.FLOAT))
    centred = add("Sub", whole, constant("zero", 128, np.float32))
    scale = add("Unsqueeze", add("Gather", scales, ids, axis=0), constant("axis", [-1], np.int64))
    form = constant("form", [0] * len(ids.shape) + [width], np.int64)
    add("Reshape", add("Mul", centred, scale), form)
    _substitute(graph, node, new)


def _halve(graph: Any) -> None:
    """Large constants in float16, read through a cast: every runtime computes in float32."""
    import onnx_ir

    first = next(iter(graph))
    for name, value in list(graph.initializers.items()):
        if not _large(value) or name.endswith(_SCALES):
            continue
        half = _constant(graph, f"{name}_half", value.const_value.numpy().astype(np.float16))
        cast = onnx_ir.node("Cast", [half], {"to": int(onnx_ir.DataType.FLOAT)})
        cast.outputs[0].name = f"{name}_read"
        cast.outputs[0].shape, cast.outputs[0].type = value.shape, value.type
        graph.insert_before(first, cast)
        onnx_ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        graph.initializers.pop(name)


def _drop_unread(graph: Any) -> None:
    """Remove constants that nothing reads any more, and the turns that read them."""
    for node in list(graph):
        if node.op_type == "Transpose" and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            graph.initializers.pop(name)


def _axis(node: Any) -> int:
    return node.attributes["axis"].as_int() if "axis" in node.attributes else 0


def _float(value: Any) -> bool:
    return value is not None and value.is_initializer() and value.const_value.dtype.name == "FLOAT"


def _large(value: Any) -> bool:
    return _float(value) and value.const_value.size >= _SMALLEST and len(value.shape) >= 2


def _constant(graph: Any, name: str, array: np.ndarray) -> Any:
    import onnx_ir

    tensor = onnx_ir.tensor(array, name=name)
    value = onnx_ir.Value(
        name=name, shape=onnx_ir.Shape(array.shape), type=onnx_ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _replace(graph: Any, node: Any, value: Any) -> None:
    """Let ``value`` be read in place of what ``node`` gives, and remove the node."""
    import onnx_ir

    onnx_ir.convenience.replace_all_uses_with(node.outputs[0], value)
    graph.remove(node, safe=True)


def _substitute(graph: Any, node: Any, new: Sequence[Any]) -> None:
    """Put nodes in the place of one; the last gives what it gave, under its name."""
    import onnx_ir

    old, result = node.outputs[0], new[-1].outputs[0]
    result.shape, result.type = old.shape, old.type
    graph.insert_before(node, new)
    if old.is_graph_output():
        index = list(graph.outputs).index(old)
        graph.outputs[index] = result
    onnx_ir.convenience.replace_all_uses_with(old, result)
    name, old.name = old.name, None
    result.name = name
    graph.remove(node, safe=True)
