"""Singular values at the bonds, from the cores alone, against the multiplied-out operator's."""

import pytest
import torch

from tensorfold.algebra.contraction.apply import to_dense
from tensorfold.algebra.solvers.ttsvd import tt_svd, unfold
from tensorfold.algebra.specs.spec import Spec
from tensorfold.algebra.spectrum import bond_spectra


@pytest.mark.parametrize(
    "spec",
    [
        Spec.low_rank(12, 20, 5),
        Spec.kronecker(12, 20, (4, 5), 3),
        Spec.mpo(24, 36, 3, 6),
        Spec((4, 6, 2), (3, 5, 2), (8, 4), out_features=45, in_features=29),
    ],
    ids=str,
)
def test_they_are_those_of_the_unfoldings(spec):
    torch.manual_seed(0)
    cores = [torch.randn(shape) for shape in spec.core_shapes]
    whole = Spec(spec.out_modes, spec.in_modes, spec.ranks)
    flat = unfold(to_dense([core.double() for core in cores], whole), whole)
    found = bond_spectra(cores)
    rows = 1
    assert len(found) == spec.sites - 1
    for (_, m, n, bond), values in zip(spec.core_shapes, found, strict=False):
        rows *= m * n
        expected = torch.linalg.svdvals(flat.reshape(rows, -1))
        assert len(values) == bond
        torch.testing.assert_close(values, expected[:bond])
        torch.testing.assert_close(expected[bond:], torch.zeros_like(expected[bond:]), atol=1e-6, rtol=0)


def test_of_a_best_approximation_they_are_the_matrix_own():
    torch.manual_seed(0)
    weight = torch.randn(12, 20, dtype=torch.float64)
    (values,) = bond_spectra(tt_svd(weight, Spec.low_rank(12, 20, 5)))
    torch.testing.assert_close(values, torch.linalg.svdvals(weight)[:5])


def test_one_site_has_no_bond():
    assert bond_spectra([torch.randn(1, 3, 4, 1)]) == []
