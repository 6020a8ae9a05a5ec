"""The algebra: specs, counts, contraction and TT-SVD, as properties over generated shapes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorfold.algebra.contraction.apply import apply, rows, to_dense
from tensorfold.algebra.contraction.paths import cheapest_order
from tensorfold.algebra.solvers.solve import fit, relative_error
from tensorfold.algebra.solvers.ttsvd import tt_svd
from tensorfold.algebra.specs.bonds import attainable_ranks
from tensorfold.algebra.specs.modes import balanced_modes, divisors, nearest_divisors
from tensorfold.algebra.specs.spec import Spec
from tensorfold.errors import SpecError

modes = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@st.composite
def specs(draw, padded=True):
    """Any spec of up to four sites: modes, reachable bonds, sometimes padding."""
    out_modes = draw(modes)
    in_modes = draw(st.lists(st.integers(1, 5), min_size=len(out_modes), max_size=len(out_modes)))
    ranks, left = [], 1
    for k, largest in enumerate(attainable_ranks(out_modes, in_modes)):
        left = draw(st.integers(1, min(largest, left * out_modes[k] * in_modes[k])))
        ranks.append(left)
    # The right neighbour bounds a bond too; lower it where the draw overshot.
    right = 1
    for k in reversed(range(len(ranks))):
        ranks[k] = right = min(ranks[k], right * out_modes[k + 1] * in_modes[k + 1])
    rows_, columns = math.prod(out_modes), math.prod(in_modes)
    if padded and draw(st.booleans()):
        rows_, columns = draw(st.integers(1, rows_)), draw(st.integers(1, columns))
    return Spec(tuple(out_modes), tuple(in_modes), tuple(ranks), rows_, columns)


def random_cores(spec, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in spec.core_shapes]


def explicit_dense(cores, spec):
    """The definition, entry by entry: W[i, j] = G1[i1, j1] … GL[iL, jL]."""
    out = torch.empty(spec.out_features, spec.in_features, dtype=cores[0].dtype)
    for i in range(spec.out_features):
        for j in range(spec.in_features):
            product = torch.ones(1, 1, dtype=cores[0].dtype)
            a, b = i, j
            strides_out, strides_in = math.prod(spec.out_modes), math.prod(spec.in_modes)
            for core, m, n in zip(cores, spec.out_modes, spec.in_modes, strict=True):
                strides_out, strides_in = strides_out // m, strides_in // n
                product = product @ core[:, a // strides_out, b // strides_in, :]
                a, b = a % strides_out, b % strides_in
            out[i, j] = product
    return out


@given(specs())
@settings(max_examples=60, deadline=None)
def test_to_dense_is_the_definition(spec):
    cores = random_cores(spec)
    torch.testing.assert_close(to_dense(cores, spec), explicit_dense(cores, spec))


@given(specs(), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_apply_and_rows_agree_with_the_matrix(spec, tokens):
    cores = random_cores(spec)
    dense = to_dense(cores, spec)
    x = torch.randn(tokens, 2, spec.in_features, dtype=torch.float64)
    torch.testing.assert_close(apply(x, cores, spec), x @ dense.T)
    index = torch.arange(spec.out_features).reshape(-1, 1)
    torch.testing.assert_close(rows(index, cores, spec).squeeze(1), dense)


@given(specs())
@settings(max_examples=60, deadline=None)
def test_every_order_gives_the_same_result_and_none_is_cheaper(spec):
    """All orders of contracting an interval, enumerated; the chosen one has the fewest multiply–adds."""
    m, n, bonds = spec.out_modes, spec.in_modes, (1, *spec.ranks, 1)

    def cost(start, moves):
        a, b, total = start, start + 1, 0
        total += math.prod(n[:a]) * bonds[a] * m[a] * n[a] * bonds[b] * math.prod(n[b:])
        for move in moves:
            done = math.prod(m[a:b])
            if move == "R":
                total += (
                    math.prod(n[:a]) * bonds[a] * done * bonds[b] * n[b] * m[b] * bonds[b + 1] * math.prod(n[b + 1 :])
                )
                b += 1
            else:
                a -= 1
                total += math.prod(n[:a]) * bonds[a] * m[a] * n[a] * bonds[a + 1] * done * bonds[b] * math.prod(n[b:])
        return total

    def orders(a, b, start, moves):
        if (a, b) == (0, spec.sites):
            yield start, moves
        if b < spec.sites:
            yield from orders(a, b + 1, start, moves + "R")
        if a > 0:
            yield from orders(a - 1, b, start, moves + "L")

    everything = [order for k in range(spec.sites) for order in orders(k, k + 1, k, "")]
    chosen = cheapest_order(spec.out_modes, spec.in_modes, spec.ranks)
    assert chosen.macs == spec.macs == min(cost(*order) for order in everything) == cost(chosen.start, chosen.moves)


@given(specs(padded=False))
@settings(max_examples=60, deadline=None)
def test_tt_svd_recovers_what_has_the_rank(spec):
    dense = to_dense(random_cores(spec), spec)
    again = to_dense(tt_svd(dense, spec), spec)
    assert relative_error(dense, again) < 1e-10


@given(st.integers(2, 6), st.integers(2, 6), st.integers(2, 6), st.integers(2, 6), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_van_loan_is_the_optimum_of_the_rearranged_matrix(m1, n1, m2, n2, terms):
    terms = min(terms, m1 * n1, m2 * n2)
    spec = Spec.kronecker(m1 * m2, n1 * n2, (m1, n1), terms)
    weight = torch.randn(m1 * m2, n1 * n2, dtype=torch.float64)
    # Van Loan and Pitsianis' rearrangement written out: row (i1, j1) holds block (i1, j1), flattened.
    blocks = [weight[i * m2 : (i + 1) * m2, j * n2 : (j + 1) * n2].reshape(-1) for i in range(m1) for j in range(n1)]
    tail = torch.linalg.svdvals(torch.stack(blocks))[terms:]
    cores = tt_svd(weight, spec)
    assert abs((weight - to_dense(cores, spec)).norm() - tail.norm()) < 1e-8 * weight.norm()
    norms = [torch.linalg.vector_norm(cores[0], dim=(0, 1, 2)), torch.linalg.vector_norm(cores[1], dim=(1, 2, 3))]
    torch.testing.assert_close(*norms, rtol=1e-6, atol=1e-9)
    kronecker = sum(
        torch.kron(cores[0][0, :, :, k].contiguous(), cores[1][k, :, :, 0].contiguous()) for k in range(terms)
    )
    torch.testing.assert_close(to_dense(cores, spec), kronecker)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.booleans())
@settings(max_examples=60, deadline=None)
def test_whitened_low_rank_is_optimal(rows_, columns, rank, singular):
    """Against the textbook solution, for metrics of full and of deficient rank."""
    rank = min(rank, rows_, columns)
    spec = Spec.low_rank(rows_, columns, rank)
    generator = torch.Generator().manual_seed(rows_ * 100 + columns)
    weight = torch.randn(rows_, columns, dtype=torch.float64, generator=generator)
    samples = torch.randn(
        max(1, columns // 2) if singular else 3 * columns, columns, dtype=torch.float64, generator=generator
    )
    metric = samples.T @ samples
    approximation = to_dense(fit(weight, spec, metric), spec)
    error = torch.linalg.matrix_norm((weight - approximation) @ samples.T)
    optimum = torch.linalg.svdvals(weight @ samples.T)[rank:].norm()
    assert abs(error - optimum) < 1e-7 * (1 + torch.linalg.matrix_norm(weight @ samples.T))


@given(st.integers(1, 3000), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_balanced_modes_cover_with_least_padding(size, sites):
    found = balanced_modes(size, sites)
    assert len(found) == sites
    assert math.prod(found) >= size
    assert list(found) == sorted(found)
    assert sites == 1 or found[-1] <= 2 * found[0]
    if sites == 2:
        smaller = [p for p in range(size, math.prod(found)) if any(d * 2 >= p // d >= d for d in divisors(p))]
        assert not smaller


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_divisors_and_nearest(n, to):
    assert divisors(n) == tuple(d for d in range(1, n + 1) if n % d == 0)
    assert all(n % d == 0 for d in nearest_divisors(n, to))


def test_padding_is_never_counted_as_kept_quality():
    """A prime size: the error is over the real rows and columns, and a full-rank spec is exact on them."""
    spec = Spec.mpo(53, 31, 2, 4)
    assert (spec.out_features, spec.in_features) == (53, 31)
    assert math.prod(spec.out_modes) > 53
    weight = torch.randn(53, 31, dtype=torch.float64)
    cores = tt_svd(weight, spec)
    approximation = to_dense(cores, spec)
    assert approximation.shape == (53, 31)
    assert relative_error(weight, approximation) == pytest.approx(
        float((weight - approximation).norm() / weight.norm()), rel=1e-9
    )
    assert spec.parameters == sum(core.numel() for core in cores)
    full = Spec.from_modes(spec.out_modes, spec.in_modes, max(attainable_ranks(spec.out_modes, spec.in_modes)), 53, 31)
    assert relative_error(weight, to_dense(tt_svd(weight, full), full)) < 1e-10


def test_contract_example():
    spec = Spec(out_modes=(768, 4), in_modes=(768, 1), ranks=(1,))
    assert (spec.out_features, spec.in_features, spec.parameters, spec.macs) == (3072, 768, 589_828, 592_896)
    assert spec == Spec.kronecker(3072, 768, (768, 768))
    assert str(spec) == "1 × (768×768 ⊗ 4×1)"
    assert Spec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Spec.kronecker(50257, 768, (64, 64)), "nearest divisors are 29 and 1733"),
        (lambda: Spec((4, 4), (4, 4), (17,)), "largest attainable there is 16"),
        (lambda: Spec((4, 4, 4), (4, 4, 4), (1, 17)), "largest attainable there is 16"),
        (lambda: Spec((2, 2, 4), (2, 2, 4), (1, 5)), "largest attainable there is 4"),
        (lambda: Spec.mpo(64, 64, 3, 10**6), "largest attainable is 16"),
        (lambda: Spec.low_rank(64, 32, 33), "largest attainable there is 32"),
        (lambda: Spec((3,), (3,), (1,)), "0 are needed"),
        (lambda: Spec((3, 2), (3,), (1,)), "every site needs one of each"),
        (lambda: Spec((3, 0), (3, 1), (1,)), "positive integers"),
        (lambda: Spec((3, 2), (3, 1), (1,), out_features=7), "at least 7"),
        (lambda: Spec((3, 2, 1), (3, 1, 1), (1, 1), scalars=True), "drop scalars"),
        (lambda: Spec.from_dict({"out_modes": [2]}), "needed out_modes, in_modes, ranks"),
        (lambda: balanced_modes(0, 2), "at least 1"),
    ],
)
def test_errors_name_what_was_got_and_what_is_possible(make, message):
    with pytest.raises(SpecError, match=message):
        make()


def test_fit_refuses_wrong_shapes_and_values_that_are_not_finite():
    spec = Spec.low_rank(4, 3, 2)
    with pytest.raises(SpecError, match=r"\(3, 4\)"):
        fit(torch.zeros(3, 4), spec)
    with pytest.raises(SpecError, match="NaN"):
        fit(torch.full((4, 3), float("nan")), spec)
    with pytest.raises(SpecError, match="metric"):
        fit(torch.ones(4, 3), spec, torch.eye(4))
    with pytest.raises(SpecError, match="activations"):
        fit(torch.ones(4, 3), spec, torch.full((3, 3), float("inf")))


def test_tt_svd_is_deterministic_and_takes_half_precision():
    weight = torch.randn(24, 18)
    spec = Spec.mpo(24, 18, 2, 5)
    first, second = tt_svd(weight, spec), tt_svd(weight, spec)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for dtype in (torch.float16, torch.bfloat16):
        cores = tt_svd(weight.to(dtype), spec)
        assert {core.dtype for core in cores} == {torch.float32}
        torch.testing.assert_close(to_dense(cores, spec), to_dense(first, spec), rtol=0.05, atol=0.05)
