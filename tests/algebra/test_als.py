"""Weighted ALS against explicit least squares and the whitened SVD."""

import pytest
import torch
from torch import Tensor

from tensorfold.algebra.contraction.apply import to_dense
from tensorfold.algebra.solvers import als, als_cg
from tensorfold.algebra.solvers.als import weighted_als
from tensorfold.algebra.solvers.normal_equations import conjugate_gradients, definite
from tensorfold.algebra.solvers.solve import fit
from tensorfold.algebra.solvers.ttsvd import tt_svd
from tensorfold.algebra.specs.spec import Spec
from tensorfold.errors import InputError, SpecError

SPECS = {
    "kronecker-right": Spec((12, 1), (5, 2), (1,)),
    "kronecker-left": Spec((2, 6), (1, 10), (1,)),
    "kronecker-terms": Spec((4, 3), (2, 5), (3,)),
    "low-rank": Spec.low_rank(12, 10, 4),
    "three-sites": Spec((2, 3, 2), (5, 1, 2), (4, 3)),
    "padded": Spec((3, 4), (4, 3), (2,), 11, 10),
    "one-site": Spec((12,), (10,)),
}


def problem(spec: Spec, inputs: int = 40) -> tuple[Tensor, Tensor]:
    """A weight, and the square root of a badly conditioned second moment of rank at most ``inputs``."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(spec.out_features, spec.in_features, generator=generator, dtype=torch.float64)
    scale = torch.logspace(1, -2, spec.in_features, dtype=torch.float64)
    root = torch.randn(inputs, spec.in_features, generator=generator, dtype=torch.float64) * scale
    return weight, root


def random_cores(spec: Spec, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in spec.core_shapes]


def output_error(weight: Tensor, cores: list[Tensor], spec: Spec, root: Tensor) -> float:
    target = root @ weight.T
    return float((target - root @ to_dense(cores, spec).T).norm() / target.norm())


def best_single_core(weight: Tensor, cores: list[Tensor], spec: Spec, root: Tensor, k: int) -> float:
    """The error after an explicit least-squares solve for core k: its design matrix, one column an entry."""
    columns = []
    for entry in torch.eye(cores[k].numel(), dtype=torch.float64):
        probe = [*cores[:k], entry.reshape(cores[k].shape), *cores[k + 1 :]]
        columns.append((root @ to_dense(probe, spec).T).flatten())
    design, target = torch.stack(columns, dim=1), (root @ weight.T).flatten()
    solution = torch.linalg.lstsq(design, target[:, None], driver="gelsd").solution[:, 0]
    return float((target - design @ solution).norm() / target.norm())


@pytest.fixture(params=["direct", "conjugate-gradients"])
def _solver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "conjugate-gradients":
        monkeypatch.setattr(als, "DIRECT_UNKNOWNS", 0)


@pytest.mark.usefixtures("_solver")
@pytest.mark.parametrize("inputs", [40, 6], ids=["regular", "singular"])
@pytest.mark.parametrize("name", SPECS)
def test_error_falls_to_where_no_core_can_be_improved(name: str, inputs: int) -> None:
    spec = SPECS[name]
    weight, root = problem(spec, inputs)
    start = tt_svd(weight, spec)
    fit = weighted_als(weight, spec, start, root.T @ root, sweeps=150, tolerance=1e-9)
    assert [tuple(core.shape) for core in fit.cores] == list(spec.core_shapes)
    assert fit.errors[0] == pytest.approx(output_error(weight, start, spec, root), abs=1e-7)
    assert fit.error == pytest.approx(output_error(weight, fit.cores, spec, root), abs=1e-7)
    assert all(after <= before for before, after in zip(fit.errors, fit.errors[1:], strict=False))
    for k in range(spec.sites):
        assert fit.error <= best_single_core(weight, fit.cores, spec, root, k) * (1 + 1e-3) + 1e-6


@pytest.mark.usefixtures("_solver")
@pytest.mark.parametrize("name", ["kronecker-terms", "three-sites", "padded"])
def test_one_sweep_is_at_least_the_explicit_alternating_solve(name: str) -> None:
    spec = SPECS[name]
    weight, root = problem(spec)
    start = random_cores(spec)
    first = best_single_core(weight, start, spec, root, 0)
    errors = weighted_als(weight, spec, start, root.T @ root, sweeps=1).errors
    assert len(errors) == 2
    assert errors[1] <= first + 1e-9
    assert first < errors[0]


def test_low_rank_reaches_the_whitened_svd() -> None:
    spec = SPECS["low-rank"]
    weight, root = problem(spec)
    tail = torch.linalg.svdvals(root @ weight.T)
    optimum = float(tail[4:].norm() / tail.norm())
    fit = weighted_als(weight, spec, tt_svd(weight, spec), root.T @ root, sweeps=200, tolerance=1e-9)
    assert fit.error == pytest.approx(optimum, rel=1e-5)
    assert fit.errors[0] > 1.2 * optimum


@pytest.mark.parametrize("name", [name for name in SPECS if name != "padded"])
def test_planted_weight_is_recovered_from_nearby(name: str) -> None:
    spec = SPECS[name]
    _, root = problem(spec)
    planted = random_cores(spec, seed=1)
    start = [core + 0.05 * noise for core, noise in zip(planted, random_cores(spec, seed=2), strict=True)]
    fit = weighted_als(to_dense(planted, spec), spec, start, root.T @ root, sweeps=100, tolerance=0.0)
    assert fit.errors[0] > 1e-3
    assert fit.error < 1e-6


@pytest.mark.parametrize("metric", [False, True])
def test_rows_and_columns_of_padding_cost_nothing(metric: bool) -> None:
    spec = SPECS["padded"]
    planted = random_cores(spec, seed=1)  # nonzero in the twelfth row and in the last columns, which W does not have
    start = [core + 0.05 * noise for core, noise in zip(planted, random_cores(spec, seed=2), strict=True)]
    c = torch.eye(10, dtype=torch.float64) if metric else None
    fit = weighted_als(to_dense(planted, spec), spec, start, c, sweeps=200, tolerance=0.0)
    assert fit.errors[0] > 1e-2
    assert fit.error < 1e-6


def test_without_a_metric_the_tt_svd_of_two_sites_is_already_best() -> None:
    spec = SPECS["kronecker-terms"]
    weight, _ = problem(spec)
    errors = weighted_als(weight, spec, tt_svd(weight, spec)).errors
    assert errors[-1] == pytest.approx(errors[0], rel=1e-12)
    identity = weighted_als(weight, spec, random_cores(spec), torch.eye(10), sweeps=50, tolerance=1e-12)
    assert identity.error == pytest.approx(errors[-1], rel=1e-4)


def test_without_a_metric_three_sites_improve_on_the_tt_svd() -> None:
    spec = Spec((2, 3, 2), (5, 1, 2), (2, 2))
    weight, _ = problem(spec)
    fit = weighted_als(weight, spec, tt_svd(weight, spec))
    assert fit.error < fit.errors[0] - 1e-4
    plain = float((weight - to_dense(fit.cores, spec)).norm() / weight.norm())
    assert fit.error == pytest.approx(plain, rel=1e-9)


def test_same_input_gives_the_same_bits_and_leaves_the_start_alone() -> None:
    spec = SPECS["three-sites"]
    weight, root = problem(spec)
    start = tt_svd(weight, spec)
    kept = [core.clone() for core in start]
    first, second = (weighted_als(weight, spec, start, root.T @ root, sweeps=4) for _ in range(2))
    assert first.errors == second.errors
    assert all(torch.equal(a, b) for a, b in zip(first.cores, second.cores, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(start, kept, strict=True))


@pytest.mark.parametrize(
    ("given", "result"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_dtype_of_the_cores(given: torch.dtype, result: torch.dtype) -> None:
    spec = SPECS["kronecker-terms"]
    weight, root = problem(spec)
    cores = weighted_als(weight.to(given), spec, random_cores(spec), (root.T @ root).float(), sweeps=1).cores
    assert {core.dtype for core in cores} == {result}


def test_zero_weight_and_dead_inputs_stay_finite() -> None:
    spec = SPECS["kronecker-terms"]
    weight, root = problem(spec)
    zero = torch.zeros_like(weight)
    assert weighted_als(zero, spec, tt_svd(zero, spec), root.T @ root).error == 0.0
    root[:, 3:6] = 0.0
    cores = weighted_als(weight, spec, random_cores(spec), root.T @ root).cores
    assert all(core.isfinite().all() for core in cores)
    silent = weighted_als(weight, spec, random_cores(spec), torch.zeros(10, 10))
    assert silent.errors == (0.0,)


def test_bad_inputs_name_what_was_needed() -> None:
    spec = SPECS["kronecker-terms"]
    weight, root = problem(spec)
    start, metric = random_cores(spec), root.T @ root
    with pytest.raises(InputError, match=r"\(9, 9\); needed \(10, 10\)"):
        weighted_als(weight, spec, start, metric[:9, :9])
    with pytest.raises(InputError, match="NaN"):
        weighted_als(weight, spec, start, metric * float("nan"))
    with pytest.raises(InputError, match="semidefinite"):
        weighted_als(weight, spec, start, -metric)
    with pytest.raises(InputError, match="semidefinite"):
        weighted_als(weight, spec, start, torch.ones(10, 10) - 0.9 * torch.eye(10))
    with pytest.raises(InputError, match="the spec needs"):
        weighted_als(weight, spec, start[:1], metric)
    with pytest.raises(InputError, match="always"):
        weighted_als(weight.T, spec, start, metric)


def test_a_metric_that_rounding_made_indefinite_does_not_run_away():
    """LayerNorm's outputs have no mean, so their second moment is singular, and in fp32 a hair below."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 32, generator=generator).double()
    x = x - x.mean(1, keepdim=True)
    nothing = torch.ones(32, dtype=torch.float64) / 32**0.5
    metric = x.T @ x / 300 - 6e-9 * nothing[:, None] * nothing
    assert torch.linalg.eigvalsh(metric)[0] < -5e-9
    weight = torch.randn(128, 32, generator=generator)
    spec = Spec((64, 2), (1, 32), (16,))
    fit = weighted_als(weight, spec, tt_svd(weight, spec), metric, sweeps=60)
    assert 0.3 < fit.error < 1
    assert to_dense(fit.cores, spec).norm() < 2 * weight.norm()


def two_sided_error(weight: Tensor, product: Tensor, inputs: Tensor, outputs: Tensor) -> float:
    g = torch.diag(outputs) if outputs.dim() == 1 else outputs
    error = weight - product
    return float(((g @ error @ inputs * error).sum() / (g @ weight @ inputs * weight).sum()).sqrt())


def output_metric(spec: Spec, diagonal: bool) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    root = torch.randn(40, spec.out_features, generator=generator, dtype=torch.float64)
    root = root * torch.logspace(0.5, -1, spec.out_features, dtype=torch.float64)
    return root.square().mean(0) if diagonal else root.T @ root / len(root)


@pytest.mark.parametrize("diagonal", [False, True], ids=["matrix", "rows"])
@pytest.mark.parametrize("name", SPECS)
def test_the_error_falls_in_both_metrics(name, diagonal):
    """Monotone, reported truthfully, and lower than what the inputs' metric alone reaches."""
    spec = SPECS[name]
    weight, root = problem(spec)
    inputs, outputs = root.T @ root / len(root), output_metric(spec, diagonal)
    fit = weighted_als(weight, spec, tt_svd(weight, spec), inputs, outputs, sweeps=30)
    assert all(after <= before for before, after in zip(fit.errors, fit.errors[1:], strict=False))
    reached = two_sided_error(weight, to_dense(fit.cores, spec), inputs, outputs)
    assert fit.error == pytest.approx(reached, rel=1e-6, abs=1e-7)
    one_sided = weighted_als(weight, spec, tt_svd(weight, spec), inputs, sweeps=30)
    assert reached <= two_sided_error(weight, to_dense(one_sided.cores, spec), inputs, outputs) + 1e-6


def test_rows_that_weigh_nothing_are_not_fitted():
    """Without every other row the unfolding has rank 3, and three terms are exact; with them it has rank 6."""
    weight = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spec = Spec((6, 2), (1, 3), (3,))
    weights = torch.tensor([1.0, 0.0] * 6, dtype=torch.float64)
    assert weighted_als(weight, spec, tt_svd(weight, spec), None, weights, sweeps=60).error < 0.01
    assert weighted_als(weight, spec, tt_svd(weight, spec), None, None, sweeps=60).error > 0.1


@pytest.mark.parametrize("diagonal", [False, True], ids=["matrix", "rows"])
@pytest.mark.parametrize("shape", [(12, 10), (10, 12)])
def test_low_rank_is_the_truncated_svd_of_the_weighted_matrix(shape, diagonal):
    spec = Spec.low_rank(*shape, 4)
    weight, root = problem(spec)
    inputs, outputs = root.T @ root / len(root), output_metric(spec, diagonal)

    def half(metric: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(torch.diag(metric) if metric.dim() == 1 else metric)
        return (vectors * values.clamp_min(0).sqrt()) @ vectors.T

    singular = torch.linalg.svdvals(half(outputs) @ weight @ half(inputs))
    optimum = float((singular[4:].square().sum() / singular.square().sum()).sqrt())
    cores = fit(weight, spec, inputs, gradient_moment=outputs)
    assert two_sided_error(weight, to_dense(cores, spec), inputs, outputs) == pytest.approx(optimum, rel=1e-3)


@pytest.mark.parametrize(
    ("outputs", "said"),
    [(torch.ones(9), "needed"), (torch.full((12,), torch.nan), "NaN"), (-torch.ones(12), "semidefinite")],
)
def test_a_bad_output_metric_is_refused(outputs, said):
    spec = SPECS["kronecker-right"]
    with pytest.raises(InputError, match=said):
        weighted_als(torch.randn(12, 10), spec, random_cores(spec), None, outputs)


@pytest.mark.parametrize("site", [0, 1, 2])
def test_one_step_of_conjugate_gradients_is_exact_for_product_metrics(site, monkeypatch):
    """Where both metrics are Kronecker products over the sites, the preconditioner is the inverse."""
    monkeypatch.setattr(als_cg, "_ITERATIONS", 1)
    spec = Spec((2, 3, 2), (3, 2, 4), (3, 4))

    def product(sizes: tuple[int, ...], seed: int) -> Tensor:
        out = torch.ones(1, 1, dtype=torch.float64)
        for k, size in enumerate(sizes):
            root = torch.randn(9, size, generator=torch.Generator().manual_seed(seed + k), dtype=torch.float64)
            out = torch.kron(out, root.T @ root)
        return out

    inputs, outputs = product(spec.in_modes, 1), product(spec.out_modes, 5)
    chain = random_cores(spec)
    left, right = als._merge(chain[:site], chain[0])[0], als._merge(chain[site + 1 :], chain[0])[..., 0]
    (_, m, n, _), core = chain[site].shape, chain[site]
    wanted = als_cg.project(als_cg.weigh(als_cg.expand(core, left, right), inputs, outputs), left, right, m, n)
    solved = als_cg.improve_core(torch.zeros_like(core), wanted, left, right, inputs, outputs)
    torch.testing.assert_close(solved, core, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", [None, "weights"])
def test_a_long_diagonal_axis_stays_a_vector(rows):
    left, right = torch.ones(1, 1, 1), torch.randn(2, 1, 3)
    outputs = None if rows is None else torch.rand(100_000)
    inverses = als_cg._marginal_inverses(left, right, torch.eye(3), outputs, 100_000, 1)
    assert [inverse.dim() for inverse in inverses] == [2, 1, 2, 2]


def test_large_tables_are_fitted_in_fp32_at_any_scale(monkeypatch):
    """The error has no units, so neither has the answer, though fp32's range is short."""
    monkeypatch.setattr(als, "TABLE", 0)
    spec = SPECS["padded"]
    weight, root = problem(spec)
    inputs, weights = root.T @ root / len(root), output_metric(spec, True)
    start = tt_svd(weight, spec)
    errors = [weighted_als(weight, spec, start, inputs * scale, weights, sweeps=8).error for scale in (1.0, 1e10)]
    exact = weighted_als(weight, spec, start, inputs, torch.diag(weights), sweeps=8).error
    assert errors == pytest.approx([exact, exact], rel=0.02)


def test_conjugate_gradients_solve_and_stop():
    """In as many steps as there are unknowns to rounding; a direction without curvature ends them."""
    torch.manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64)
    h, b = root @ root.T, torch.randn(6, dtype=torch.float64)
    solved = conjugate_gradients(torch.zeros_like(b), b, lambda x: h @ x, lambda r: r, 12)
    torch.testing.assert_close(solved, torch.linalg.solve(h, b))
    start = torch.ones(3)
    assert torch.equal(conjugate_gradients(start, torch.ones(3), torch.zeros_like, lambda r: r, 5), start)


def test_moments_are_made_definite_where_rounding_made_them_indefinite():
    vectors = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    moment = (vectors.T @ vectors).double()
    assert torch.linalg.eigvalsh(definite(moment))[0] >= -1e-15
    whole = torch.eye(9, dtype=torch.float64)
    assert definite(whole) is whole
    with pytest.raises(SpecError, match="positive semidefinite"):
        definite(-whole)
