"""The permutation search on planted products, and its guarantees on weights without structure."""

import itertools

import pytest
import torch
from torch import Tensor

from tensorfold.algebra.contraction.apply import to_dense
from tensorfold.algebra.orders.permutation import search_permutations
from tensorfold.algebra.specs.spec import Spec
from tensorfold.errors import InputError


def planted(spec: Spec, *, rows: bool, columns: bool, seed: int = 0) -> Tensor:
    """An exact sum of Kronecker products with its rows and columns shuffled."""
    generator = torch.Generator().manual_seed(seed)
    cores = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in spec.core_shapes]
    weight = to_dense(cores, spec)
    if rows:
        weight = weight[torch.randperm(spec.out_features, generator=generator)]
    return weight[:, torch.randperm(spec.in_features, generator=generator)] if columns else weight


def random_weight(out_features: int, in_features: int) -> Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("spec", "rows", "columns"),
    [
        (Spec.kronecker(48, 24, (24, 24)), True, False),
        (Spec.kronecker(48, 24, (48, 12)), False, True),
        (Spec.kronecker(48, 24, (12, 6)), True, False),
        (Spec.kronecker(48, 24, (12, 6)), True, True),
    ],
    ids=["thin-rows", "thin-columns", "rows", "both"],
)
def test_shuffled_product_is_found_again(spec: Spec, rows: bool, columns: bool) -> None:
    weight = planted(spec, rows=rows, columns=columns)
    found = search_permutations(weight, spec, rows=rows, columns=columns)
    assert found.error_without > 0.6
    assert found.error < 1e-6
    assert torch.allclose(weight[found.row_order][:, found.column_order], to_dense(found.cores, spec), atol=1e-6)


def test_shuffled_sum_of_products_gets_closer() -> None:
    spec = Spec.kronecker(48, 24, (8, 8), 2)
    found = search_permutations(planted(spec, rows=True, columns=True), spec)
    assert found.error < 0.85 * found.error_without


def test_assignments_alone_unshuffle_what_only_swapped_a_few_rows() -> None:
    spec = Spec.kronecker(48, 24, (12, 6))
    generator = torch.Generator().manual_seed(1)
    weight = to_dense([torch.randn(shape, generator=generator) for shape in spec.core_shapes], spec)
    weight[[3, 17, 30]] = weight[[17, 30, 3]]
    found = search_permutations(weight, spec, columns=False, starts=1)
    assert found.error_without > 0.1
    assert found.error < 1e-5


def test_tiny_search_comes_close_to_trying_every_order() -> None:
    spec = Spec.kronecker(6, 4, (3, 2))
    weight = random_weight(6, 4)

    def error(order: tuple[int, ...]) -> float:
        permuted = weight[list(order)]
        singular = torch.linalg.svdvals(permuted.reshape(3, 2, 2, 2).permute(0, 2, 1, 3).reshape(6, 4))
        return float(singular[1:].norm() / singular.norm())

    best = min(error(order) for order in itertools.permutations(range(6)))
    found = search_permutations(weight, spec, columns=False, starts=20)
    assert found.error == pytest.approx(best, abs=1e-5)
    assert found.error == pytest.approx(error(tuple(found.row_order.tolist())), abs=1e-5)
    assert found.error_without == pytest.approx(error(tuple(range(6))), abs=1e-5)


@pytest.mark.parametrize("factor", [(24, 24), (1, 1), (48, 12), (8, 3)])
@pytest.mark.parametrize(("rows", "columns"), [(True, False), (False, True), (True, True)])
def test_guarantees_on_a_weight_without_structure(factor: tuple[int, int], rows: bool, columns: bool) -> None:
    spec = Spec.kronecker(48, 24, factor)
    weight = random_weight(48, 24)
    found = search_permutations(weight, spec, rows=rows, columns=columns, starts=4)
    for order, size, moves in ((found.row_order, 48, rows), (found.column_order, 24, columns)):
        assert order.dtype == torch.int64
        assert torch.equal(order.sort().values, torch.arange(size))
        assert moves or torch.equal(order, torch.arange(size))
    ordered = weight[found.row_order][:, found.column_order]
    measured = float((ordered - to_dense(found.cores, spec)).norm() / weight.norm())
    assert found.error == pytest.approx(measured, abs=1e-6)
    assert found.error <= found.error_without
    assert [core.dtype for core in found.cores] == [torch.float32] * 2


def test_more_sweeps_and_more_starts_never_hurt_and_repeat_exactly() -> None:
    spec = Spec.kronecker(48, 24, (8, 6))
    weight = random_weight(48, 24)
    by_sweeps = [search_permutations(weight, spec, starts=1, sweeps=n, tolerance=0.0).error for n in range(6)]
    assert all(after <= before for before, after in itertools.pairwise(by_sweeps))
    assert by_sweeps[-1] < by_sweeps[0]
    by_starts = [search_permutations(weight, spec, starts=n).error for n in range(1, 6)]
    assert all(after <= before for before, after in itertools.pairwise(by_starts))
    first, second = (search_permutations(weight, spec, starts=5) for _ in range(2))
    assert first.error == second.error
    assert torch.equal(first.row_order, second.row_order)
    assert torch.equal(first.column_order, second.column_order)


def test_zero_weight_has_no_error() -> None:
    found = search_permutations(torch.zeros(4, 4), Spec.kronecker(4, 4, (2, 2)))
    assert (found.error, found.error_without) == (0.0, 0.0)


def test_bad_inputs_name_what_was_needed() -> None:
    weight, spec = random_weight(48, 24), Spec.kronecker(48, 24, (8, 6))
    with pytest.raises(InputError, match="needed two"):
        search_permutations(weight, Spec((4, 4, 3), (2, 3, 4), (2, 2)))
    with pytest.raises(InputError, match="without padding"):
        search_permutations(weight, Spec((7, 7), (4, 6), (1,), 48, 24))
    with pytest.raises(InputError, match="let rows or columns move"):
        search_permutations(weight, spec, rows=False, columns=False)
    with pytest.raises(InputError, match="at least one start"):
        search_permutations(weight, spec, starts=0)
    with pytest.raises(InputError, match="always"):
        search_permutations(weight.T, spec)
