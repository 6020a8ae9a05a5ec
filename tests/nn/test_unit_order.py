"""Hidden units of folded MLPs in one order: the same function, and pivots that nothing has to bring into order."""

import pytest
import torch
from torch import nn

from tensorfold import Spec
from tensorfold.algebra.contraction.pivots import first_of_pivots, read_first
from tensorfold.nn import MPOLinear
from tensorfold.nn.unit_order import order_units

UNITS, WIDTH = 40, 16


def pivoted(out, into, rank, rows=None, columns=None):
    counts = {name: len(kept) for name, kept in (("rows", rows), ("columns", columns)) if kept is not None}
    spec = Spec.low_rank(out, into, rank, pivoted=True, **counts)
    layer = MPOLinear(spec)
    order = torch.randperm(out) if rows is None else rows[torch.randperm(len(rows))]
    layer.out_position.fill_(len(order))
    layer.out_position[order] = torch.arange(len(order))
    if columns is not None:
        layer.in_order.copy_(columns)
    return layer


def mlp(gate, up, down, x):
    return down(torch.nn.functional.silu(gate(x)) * up(x))


@pytest.fixture
def kept():
    torch.manual_seed(0)
    return torch.randperm(UNITS)[:31]


def layers(kind, kept):
    torch.manual_seed(1)
    if kind == "whole":
        return pivoted(UNITS, WIDTH, 6), pivoted(UNITS, WIDTH, 9), pivoted(WIDTH, UNITS, 5)
    if kind == "fewer":
        return pivoted(UNITS, WIDTH, 6, kept), pivoted(UNITS, WIDTH, 9, kept), pivoted(WIDTH, UNITS, 5, None, kept)
    if kind == "in part":
        part = MPOLinear(Spec.partial(UNITS, WIDTH, rows=31))
        part.out_position.fill_(31)
        part.out_position[kept] = torch.arange(31)
        down = MPOLinear(Spec.partial(WIDTH, UNITS, columns=31))
        down.in_order.copy_(kept)
        return part, pivoted(UNITS, WIDTH, 9, kept), down
    return nn.Linear(WIDTH, UNITS), pivoted(UNITS, WIDTH, 9), nn.Linear(UNITS, WIDTH)


@pytest.mark.parametrize("kind", ["whole", "fewer", "in part", "dense beside"])
@torch.no_grad()
def test_the_function_stays_and_nothing_is_left_to_order(kind, kept):
    gate, up, down = (layer.double() for layer in layers(kind, kept))
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    before = mlp(gate, up, down, x)
    assert order_units([gate, up], down)
    for _ in range(2):
        torch.testing.assert_close(mlp(gate, up, down, x), before)
    for layer in (gate, up):
        if isinstance(layer, MPOLinear) and layer.spec.has_pivot_rows:
            made = layer.spec.kept_sizes[0]
            assert first_of_pivots(layer.out_position, layer.spec.ranks[0], made) is not None
    if isinstance(down, MPOLinear) and down.in_order is not None:
        assert read_first(down.in_order) == 31


@torch.no_grad()
def test_pivots_that_cannot_be_parted_keep_their_order():
    torch.manual_seed(0)
    gate, up, down = pivoted(12, 16, 8), pivoted(12, 16, 7), pivoted(16, 12, 3)
    x = torch.randn(3, 16)
    before = mlp(gate, up, down, x)
    assert order_units([gate, up], down)
    torch.testing.assert_close(mlp(gate, up, down, x), before)
    assert first_of_pivots(gate.out_position, 8, 12) == 0
    assert first_of_pivots(up.out_position, 7, 12) is None


@torch.no_grad()
def test_products_are_left_alone():
    gate, up, down = (
        MPOLinear(Spec.kronecker(UNITS, WIDTH, (8, 4))),
        pivoted(UNITS, WIDTH, 6),
        nn.Linear(UNITS, WIDTH),
    )
    position = up.out_position.clone()
    assert not order_units([gate, up], down)
    assert torch.equal(up.out_position, position)
