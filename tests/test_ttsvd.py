"""TT-SVD of two sites, by whichever route its shape takes, against a full SVD in fp64."""

import math

import pytest
import torch

from tensorfold.algebra import ttsvd
from tensorfold.algebra.contraction.apply import to_dense
from tensorfold.algebra.spec import Spec
from tensorfold.algebra.ttsvd import left_basis, tt_svd, unfold
from tensorfold.errors import SpecError

# (out, in, factor, terms): thin by rows, by columns, by both, padded and of every term; wide; nearly square.
SHAPES = [
    (512, 128, (128, 128), 1),
    (128, 512, (128, 128), 3),
    (256, 192, (64, 96), 2),
    (510, 128, (128, 128), 2),
    (512, 128, (128, 128), 4),
    (256, 64, (2, 2), 2),
    (512, 288, (32, 16), 1),
    (640, 288, (32, 16), 9),
    (96, 80, (12, 10), 7),
]


def weights(rows, columns, kind):
    generator = torch.Generator().manual_seed(rows + columns)
    if kind == "flat":
        return torch.randn(rows, columns, generator=generator)
    scale = torch.arange(1, columns + 1) ** -1.5
    return torch.randn(rows, columns, generator=generator) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["flat", "falling"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_sites_are_the_best_there_is(shape, kind, dtype):
    rows, columns, factor, terms = shape
    spec = Spec.kronecker(rows, columns, factor, terms, pad=True)
    weight = weights(rows, columns, kind).to(dtype)
    cores = tt_svd(weight, spec)
    unfolded = unfold(weight.double(), spec).reshape(math.prod(spec.core_shapes[0]) // terms, -1)
    best = torch.linalg.svdvals(unfolded)[terms:].square().sum().sqrt()
    product = cores[0].double().reshape(-1, terms) @ cores[1].double().reshape(terms, -1)
    norm = torch.linalg.vector_norm(unfolded)
    error = torch.linalg.vector_norm(unfolded - product)
    assert error <= (1 + 1e-6) * best + 1e-7 * norm
    if rows % factor[0] == 0:
        assert torch.linalg.vector_norm(weight.double() - to_dense(cores, spec)) <= (1 + 1e-6) * best + 1e-6 * norm
    left, right = (
        torch.linalg.vector_norm(core, dim=dims) for core, dims in zip(cores, [(0, 1, 2), (1, 2, 3)], strict=True)
    )
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(cores, tt_svd(weight, spec), strict=True))
    assert {core.dtype for core in cores} == {torch.float64 if dtype == torch.float64 else torch.float32}


def test_the_shape_decides(monkeypatch):
    """Thin unfoldings need no basis; of many vectors a few come without the Gram matrix, of few all with it."""
    calls = []

    def noted(name):
        own = getattr(ttsvd, name)
        return lambda *given: (calls.append(name), own(*given))[1]

    for name in ("left_basis", "_krylov", "gram"):
        monkeypatch.setattr(ttsvd, name, noted(name))
    for columns, factor, terms in [(128, (128, 128), 1), (288, (32, 16), 1), (288, (32, 16), 200)]:
        calls.append(factor)
        tt_svd(weights(512, columns, "flat"), Spec.kronecker(512, columns, factor, terms))
    assert calls == [(128, 128), (32, 16), "left_basis", "_krylov", (32, 16), "left_basis", "gram"]


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_exact_ranks_and_nothing_at_all(rank):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(300, 5, generator=generator).double() @ torch.randn(5, 400, generator=generator).double()
    basis = left_basis(matrix, rank)
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank).double())
    best = torch.linalg.svdvals(matrix)[rank:].square().sum().sqrt()
    assert torch.linalg.vector_norm(matrix - basis @ (basis.T @ matrix)) <= (1 + 1e-6) * best + 1e-9
    zero = left_basis(torch.zeros(300, 400), rank)
    torch.testing.assert_close(zero.T @ zero, torch.eye(rank))


def test_equal_singular_values():
    basis = left_basis(torch.eye(400), 3)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3))


def test_a_thin_weight_of_zeros_or_with_a_nan():
    spec = Spec.kronecker(512, 128, (128, 128))
    assert all(torch.equal(core, torch.zeros_like(core)) for core in tt_svd(torch.zeros(512, 128), spec))
    weight = torch.zeros(512, 128)
    weight[3, 4] = math.inf
    with pytest.raises(SpecError, match="NaN or infinity"):
        tt_svd(weight, spec)
    with pytest.raises(SpecError, match="needs \\(512, 128\\)"):
        tt_svd(weight.T, spec)
