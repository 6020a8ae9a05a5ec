"""Constants of OpenVINO graphs: a table reads its rows from a head that holds them, and computes the same."""

import numpy as np
import pytest

from tensorfold.export.openvino_weights import share_tables

openvino = pytest.importorskip("openvino")

TABLE = np.random.default_rng(0).standard_normal((12, 1, 2, 3)).astype(np.float32)  # (v, …), six numbers a row
ROWS = TABLE.reshape(12, 6)
CHANGED = np.where(np.arange(6) == 5, 0.5, ROWS).astype(np.float32)
# By case: the head's constant (p, q), and whether it holds the table.
HEADS = {
    "as it is": (ROWS, True),
    "filled up with zeros": (np.pad(ROWS, ((0, 0), (0, 2))), True),
    "in other rows": (ROWS.reshape(24, 3), True),
    "filled up with something else": (np.pad(ROWS, ((0, 0), (0, 2)), constant_values=1), False),
    "turned": (np.ascontiguousarray(ROWS.T), False),
    "others": (CHANGED, False),
}


def graph(head):
    """Of ids (1, 5) and x (1, q): rows of the table, and x times the head."""
    from openvino import opset13 as operators

    ids = operators.parameter([1, -1], dtype=np.int64, name="ids")
    x = operators.parameter([1, head.shape[1]], dtype=np.float32, name="x")
    rows = operators.gather(operators.constant(TABLE), ids, operators.constant(0, dtype=np.int64))
    product = operators.matmul(x, operators.constant(head), False, True)
    return openvino.Model([rows, product], [ids, x], "tied")


@pytest.mark.parametrize("case", HEADS)
def test_a_table_reads_from_a_head_that_holds_it(case):
    head, holds = HEADS[case]
    given = {"ids": np.array([[3, 0, 11, 3, 7]]), "x": np.ones((1, head.shape[1]), np.float32)}
    program = graph(head)
    before = openvino.compile_model(program, "CPU")(given)
    share_tables(program)
    constants = [node for node in program.get_ops() if node.get_type_name() == "Constant"]
    floats = sum(node.get_data().size for node in constants if node.get_element_type().get_type_name() == "f32")
    assert floats == head.size + (0 if holds else TABLE.size)
    after = openvino.compile_model(program, "CPU")(given)
    for output in range(2):
        np.testing.assert_array_equal(after[output], before[output])
    np.testing.assert_array_equal(after[0], TABLE[given["ids"]])
