"""TT-SVD against tensorly's tensor-train decomposition, which has another author, layout and SVD."""

import pytest
import torch

from tensorfold.algebra.contraction.apply import to_dense
from tensorfold.algebra.solvers.ttsvd import tt_svd
from tensorfold.algebra.specs.spec import Spec

tensorly = pytest.importorskip("tensorly")
decomposition = pytest.importorskip("tensorly.decomposition")

# (out modes, in modes, bond): two sites are the Van Loan decomposition; the last loses nothing, every bond is in full.
SHAPES = [
    ((6, 4), (5, 8), 7),
    ((4, 3, 5), (3, 4, 2), 6),
    ((2, 3, 2, 4), (3, 2, 4, 2), 5),
    ((3, 2, 3), (2, 4, 2), 6),
]


def random_matrix(spec):
    """A matrix (out, in) in fp64 whose singular values at every bond are far apart, so that the bases are unique."""
    generator = torch.Generator().manual_seed(spec.out_features)
    matrix = torch.randn(spec.out_features, spec.in_features, generator=generator, dtype=torch.float64)
    return matrix * torch.linspace(1, 3, spec.in_features, dtype=torch.float64)


@pytest.fixture(autouse=True)
def torch_backend():
    before = tensorly.get_backend()
    tensorly.set_backend("pytorch", local_threadsafe=True)
    yield
    tensorly.set_backend(before, local_threadsafe=True)


@pytest.mark.parametrize(("out_modes", "in_modes", "bond"), SHAPES)
def test_ranks_and_matrix_are_those_of_tensorly(out_modes, in_modes, bond):
    """Cores are unique up to an invertible matrix at every bond (the gauge); ranks and the product are unique."""
    spec = Spec.from_modes(out_modes, in_modes, bond)
    weight = random_matrix(spec)
    cores = tt_svd(weight, spec)
    theirs = decomposition.tensor_train_matrix(weight.reshape(*out_modes, *in_modes), rank=(1, *spec.ranks, 1))
    assert [tuple(core.shape) for core in cores] == [tuple(core.shape) for core in theirs]
    product = tensorly.tt_matrix_to_tensor(theirs).reshape(weight.shape)
    torch.testing.assert_close(to_dense(cores, spec), product, rtol=0, atol=1e-10 * float(weight.norm()))


@pytest.mark.parametrize(("out_modes", "in_modes", "bond"), SHAPES)
def test_the_product_up_to_every_bond_spans_what_tensorlys_does(out_modes, in_modes, bond):
    """The gauge cancels in the projection on the left cores' span, (rows, rows) at each bond."""
    spec = Spec.from_modes(out_modes, in_modes, bond)
    weight = random_matrix(spec)
    theirs = decomposition.tensor_train_matrix(weight.reshape(*out_modes, *in_modes), rank=(1, *spec.ranks, 1))
    for ours, other in zip(spans(tt_svd(weight, spec)), spans(list(theirs)), strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-8)


def spans(cores):
    left = torch.ones(1, 1, dtype=torch.float64)  # (rows so far, r)
    for core in cores[:-1]:
        r, m, n, s = core.shape
        left = (left @ core.reshape(r, m * n * s)).reshape(-1, s)  # (rows so far · m · n, s)
        basis, _ = torch.linalg.qr(left)
        yield basis @ basis.T
