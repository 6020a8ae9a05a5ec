"""TT-SVD of two sites, by whichever route its shape takes, against a full SVD in fp64."""

import math

import pytest
import torch

from tensorfold.algebra.contraction.apply import to_dense
from tensorfold.algebra.solvers import ttsvd
from tensorfold.algebra.solvers.ttsvd import left_basis, tt_svd, unfold
from tensorfold.algebra.specs.spec import Spec
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


def deficient(kind, directions):
    """A matrix (320, 400) of that rank: most of it is zero, or its rows repeat, as in pruned and unused weights."""
    generator = torch.Generator().manual_seed(directions)
    whole = torch.randn(320, 400, generator=generator, dtype=torch.float64)
    matrix = torch.zeros_like(whole)
    if kind == "corner":
        matrix[:directions, :directions] = whole[:directions, :directions]
    elif kind == "rows":
        matrix[:directions] = whole[:directions]
    elif kind == "columns":
        matrix[:, -directions:] = whole[:, -directions:].mul(3).round()
    elif kind == "diagonal":
        matrix.diagonal()[:directions] = torch.linspace(1, 2, directions, dtype=torch.float64)
    elif kind == "repeated":
        matrix = whole[:directions].repeat(-(-320 // directions), 1)[:320]
    else:
        scale = 10.0 ** -torch.arange(directions)
        matrix = whole[:, :directions] * scale @ whole[:directions] / 400
    return matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("directions", [1, 3, 8, 16, 30])
@pytest.mark.parametrize("kind", ["corner", "rows", "columns", "diagonal", "repeated", "falling"])
def test_matrices_with_few_directions(monkeypatch, kind, directions, dtype):
    """The space stays orthogonal, so it never holds more energy than there is, and it is found complete at once."""
    matrix = deficient(kind, directions).to(dtype)
    values = torch.linalg.svdvals(matrix.double()).square()
    eigh, held = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: (held.append(float(gram.trace())), eigh(gram))[1])
    for rank in (1, 4, 7, 12):
        for turned in (matrix, matrix.T.contiguous()):
            held.clear()
            found = ttsvd._krylov(turned, rank)
            assert max(held) <= float(values.sum()) * (1 + 1e-5)
            if rank <= directions:
                assert found is not None
            for basis, of in ((found, turned), (left_basis(turned, rank), turned.T)):
                if basis is not None:
                    torch.testing.assert_close(basis.T @ basis, torch.eye(rank, dtype=dtype), rtol=0, atol=5e-6)
                    kept = float((of.double() @ basis.double()).square().sum())
                    assert kept == pytest.approx(float(values[:rank].sum()), rel=5e-6)


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
