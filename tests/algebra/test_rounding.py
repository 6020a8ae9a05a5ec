"""Factors rounded together: on the grid, idempotent, and closer to the product than each rounded by itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorfold import LowRank
from tensorfold.algebra.solvers.rounding import Grid, rounded_factors
from tensorfold.nn import MPOLinear
from tensorfold.nn.rounded import rounded_cores

GRIDS = {
    "int8 a row": Grid(127),
    "NNCF's int8": Grid(128, signed=True),
    "MatMulNBits in 4": Grid(8, signed=True, group=32),
    "groups of 5": Grid(8, signed=True, group=5),
}


def by_itself(matrix, grid):
    """Each group by its largest number, as the packers do: whole numbers times a step."""
    matrix = matrix.double()
    out = torch.empty_like(matrix)
    size = grid.group or matrix.shape[1]
    for first in range(0, matrix.shape[1], size):
        part = matrix[:, first : first + size]
        peak = part.gather(1, part.abs().argmax(1, keepdim=True))
        step = torch.where(peak == 0, 1.0, peak / grid.largest)  # of the peak's sign, so that it is ``largest`` steps
        low = -(grid.largest - grid.signed)
        out[:, first : first + size] = (part / step).round().clamp(low, grid.largest) * step
    return out


def matrix_of(left, right, pivots):
    return torch.cat([right, left @ right]) if pivots else left @ right


def factors(out, rank, into, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rank, rank, generator=generator) @ torch.diag(torch.logspace(0, -spread, rank))
    left, right = torch.randn(out, rank, generator=generator), mixed @ torch.randn(rank, into, generator=generator)
    return left.double(), right.double()


@pytest.mark.parametrize("pivots", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_they_lie_on_the_grid_and_their_product_is_nearer(grid, pivots):
    grid = GRIDS[grid]
    left, right = factors(48, 24, 64)
    wanted = matrix_of(left, right, pivots)
    together = rounded_factors(left, right, pivots, grid)
    for each in together:
        torch.testing.assert_close(by_itself(each, grid), each, rtol=1e-9, atol=0)
    alone = [by_itself(each, grid) for each in (left, right)]
    errors = [float((matrix_of(*each, pivots) - wanted).norm() / wanted.norm()) for each in (together, alone)]
    assert 0 < errors[0] < 0.75 * errors[1]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 999), st.booleans(),
    st.sampled_from(sorted(GRIDS)), st.sampled_from([0.0, 1e-30, 1e30]),
)  # fmt: skip
def test_any_shape_and_size(out, rank, into, seed, pivots, grid, scale):
    left, right = factors(out, rank, into, seed, spread=0.0)
    left, right = left.float(), (right * (scale or 1)).float()
    if scale == 0.0:
        right[0] = 0
    near = rounded_factors(left, right, pivots, GRIDS[grid])
    assert [each.dtype for each in near] == [torch.float32] * 2
    for each, own in zip(near, (left, right), strict=True):
        assert each.shape == own.shape
        assert each.isfinite().all()
        torch.testing.assert_close(by_itself(each, GRIDS[grid]).float(), each, rtol=1e-5, atol=0)


def test_numbers_of_the_grid_stay():
    left, right = factors(8, 6, 10)
    grid = Grid(127)
    exact = [by_itself(each, grid) for each in (left, right)]
    for own, near in zip(exact, rounded_factors(*exact, True, grid), strict=True):
        torch.testing.assert_close(near, own, rtol=1e-9, atol=1e-12)


def test_layers_of_two_factors_alone():
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    for method, count in ((LowRank(rank=6), 2), (LowRank(rank=6, pivots=True), 2)):
        layer = MPOLinear.from_dense(weight, method.spec(24, 16))
        found = rounded_cores(layer, Grid(127))
        assert [core.shape for core in found] == [core.shape for core in layer.cores][:count]
    assert rounded_cores(torch.nn.Linear(4, 4), Grid(127)) == []
    assert rounded_cores(layer.to("meta"), Grid(127)) == []
