"""Logits of the last tokens alone: of a prompt only the last ones are read, and the head is the largest matrix.

An input ``num_logits_to_keep`` says of how many tokens; 0 is all. In an ONNX file it has the default 0, so that runners
that do not know it read the graph as any other. In OpenVINO it is added when a graph is opened to be run, as OpenVINO
GenAI adds its own.
"""

from __future__ import annotations

from typing import Any

NAME = "num_logits_to_keep"

_END = 2**63 - 1
# Between the head's product and the logits, element by element: biases, factors, soft caps.
_ONNX_BETWEEN = {"Add", "Mul", "Div", "Tanh", "Cast"}
_OPENVINO_BETWEEN = {"Add", "Multiply", "Divide", "Tanh", "Convert"}


def add_onnx_input(program: Any) -> bool:
    """Give an ``onnx_ir.Model`` the input, in place; False where the head was not found."""
    import numpy as np
    import onnx_ir

    graph = program.graph
    node = next(value for value in graph.outputs if value.name == "logits").producer()
    while node is not None and node.op_type in _ONNX_BETWEEN:
        node = node.inputs[0].producer()
    if node is None or node.op_type != "MatMul":
        return False
    hidden = node.inputs[0]
    if hidden.shape is None or len(hidden.shape) != 3:
        return False

    def constant(name: str, value: int) -> Any:
        tensor = onnx_ir.tensor(np.array([value], dtype=np.int64), name=name)
        found = onnx_ir.Value(name=name, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(found)
        return found

    count = constant(NAME, 0)
    graph.inputs.append(count)
    start = onnx_ir.Node("", "Neg", [count], name=f"{NAME}_start")  # from −0, the first, on: all
    end, axis = constant(f"{NAME}_end", _END), constant(f"{NAME}_axis", 1)
    last = onnx_ir.Node("", "Slice", [hidden, start.outputs[0], end, axis], name=f"{NAME}_slice")
    last.outputs[0].name, start.outputs[0].name = f"{NAME}_hidden", f"{NAME}_first"
    last.outputs[0].type, last.outputs[0].shape = hidden.type, onnx_ir.Shape([hidden.shape[0], None, hidden.shape[2]])
    graph.insert_before(node, [start, last])
    node.replace_input_with(0, last.outputs[0])
    return True


def add_openvino_input(program: Any) -> bool:
    """Give an ``openvino.Model`` the input, in place; False where the head was not found."""
    import numpy as np
    import openvino
    from openvino import opset13

    node = program.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() in _OPENVINO_BETWEEN:
        node = node.input_value(0).get_node()
    if node.get_type_name() != "MatMul" or len(node.input_value(0).get_partial_shape()) != 3:
        return False
    count = opset13.parameter([1], openvino.Type.i64, name=NAME)
    count.output(0).set_names({NAME})
    constants = [opset13.constant(np.array([value], dtype=np.int64)) for value in (-1, _END, 1)]
    minus, end, one = constants
    last = opset13.slice(node.input_value(0), opset13.multiply(count, minus), end, one, one)
    node.input(0).replace_source_output(last.output(0))
    program.add_parameters([count])
    program.validate_nodes_and_infer_types()
    return True
