"""Symmetric matrices stored by their upper triangles."""

import gc

import pytest
import torch

from tensorfold.calibration.packed_symmetric import Packed, numbers


def vectors(count, size):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [7, 64, 150])
def test_packed_moments_are_the_whole_ones(size, tmp_path):
    x = vectors(50, size)
    packed = Packed(size)
    for part in x.split(13):
        packed.add(part)
    packed.divide(2)
    torch.testing.assert_close(packed.full(0.5), 0.25 * x.T @ x)
    assert torch.equal(packed.full(), packed.full().T)
    assert packed.values.numel() == numbers(size) <= size * (size + 64) / 2
    whole = packed.full()
    packed.spill(tmp_path / "values")
    assert torch.equal(packed.full(), whole)
    assert torch.equal(Packed(size, path=tmp_path / "values").full(), whole)
    (tmp_path / "values").write_bytes(b"short")
    with pytest.raises(OSError, match="needed"):
        packed.full()


def test_packed_moments_leave_nothing_in_memory():
    def held():
        gc.collect()
        return sum(each.numel() * each.element_size() for each in gc.get_objects() if type(each) is torch.Tensor)

    before = held()
    packed = Packed(201)
    packed.add(vectors(5, 201))
    packed.full()
    del packed
    assert held() == before
