"""Groups of columns with one basis in both metrics: monotone, exact where it can be, and as near as general sweeps."""

import pytest
import torch

from tensorfold import Spec, SpecError
from tensorfold.algebra.contraction.apply import to_dense
from tensorfold.algebra.solvers.als import weighted_als
from tensorfold.algebra.solvers.shared_basis import fit_shared_basis
from tensorfold.algebra.solvers.solve import relative_error
from tensorfold.algebra.solvers.ttsvd import tt_svd

SHAPES = [(20, 3, 12, 5), (48, 2, 10, 4), (10, 4, 16, 9)]  # out, groups, columns of each, terms


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size, seed, rank=None):
    x = random(rank or 3 * size, size, seed=seed) * torch.logspace(0, -1.5, size, dtype=torch.float64)
    return x.T @ x / len(x)


def spec_of(shape):
    rows, groups, width, rank = shape
    return Spec((rows, 1), (groups, width), (rank,))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("known", ["nothing", "inputs", "both", "rows"])
@pytest.mark.parametrize("turned", [False, True])
def test_errors_fall_and_are_those_of_the_cores(shape, known, turned):
    spec = spec_of(shape).transposed if turned else spec_of(shape)
    weight = random(spec.out_features, spec.in_features)
    inputs = None if known == "nothing" else moment(spec.in_features, 1)
    outputs = {"both": moment(len(weight), 2), "rows": moment(len(weight), 2).diagonal()}.get(known)
    fit = fit_shared_basis(weight, spec, inputs, outputs)
    assert tuple(tuple(core.shape) for core in fit.cores) == spec.core_shapes
    assert all(later <= before for before, later in zip(fit.errors, fit.errors[1:], strict=False))
    assert fit.error == pytest.approx(relative_error(weight, to_dense(fit.cores, spec), inputs, outputs), rel=1e-6)
    general = weighted_als(weight, spec, tt_svd(weight, spec), inputs, outputs, sweeps=40)
    assert fit.error < 1.02 * general.error


def test_it_finds_a_matrix_of_its_shape_again():
    spec = spec_of((20, 3, 12, 5))
    weight = to_dense([random(*shape, seed=k) for k, shape in enumerate(spec.core_shapes)], spec)
    fit = fit_shared_basis(weight, spec, moment(36, 1), moment(20, 2), [random(*s, seed=9) for s in spec.core_shapes])
    assert fit.error < 0.1 * fit.errors[0] or fit.error < 1e-6
    assert fit_shared_basis(weight, spec, moment(36, 1), moment(20, 2)).error < 1e-6


def test_singular_metrics_are_no_trouble():
    spec = spec_of((20, 3, 12, 5))
    weight = random(20, 36)
    inputs, outputs = moment(36, 1, rank=7), moment(20, 2, rank=3)
    fit = fit_shared_basis(weight, spec, inputs, outputs)
    assert all(core.isfinite().all() for core in fit.cores)
    assert fit.error < 1e-3  # a regression on 7 inputs has an exact solution


@pytest.mark.parametrize("seed", [0, 6, 10])
def test_a_moment_of_one_vector_and_rounding(seed):
    """An expert that few tokens were sent to: eigenvalues are zero but for rounding of either sign."""
    spec, x, noise = spec_of((20, 3, 12, 5)), random(1, 36, seed=seed), random(36, 36, seed=seed + 50)
    inputs = (x.T @ x + 1e-7 * (noise + noise.T)).float()
    fit = fit_shared_basis(random(20, 36), spec, inputs, moment(20, 2))
    assert all(core.isfinite().all() for core in fit.cores)
    assert fit.error < 1e-2  # a regression on one input has an exact solution


def test_an_indefinite_metric_is_refused():
    with pytest.raises(SpecError, match="not positive semidefinite"):
        fit_shared_basis(random(20, 36), spec_of((20, 3, 12, 5)), moment(36, 1) - 0.1 * torch.eye(36))


def test_types_follow_the_weight():
    spec = spec_of((20, 3, 12, 5))
    assert fit_shared_basis(random(20, 36).bfloat16(), spec).cores[0].dtype == torch.float32


@pytest.mark.parametrize(
    "spec", [Spec((10, 2), (3, 12), (5,)), Spec((20, 1), (3, 12), (5,), in_features=35), Spec((20,), (36,))]
)
def test_other_modes_are_refused(spec):
    with pytest.raises(SpecError, match="fit_shared_basis"):
        fit_shared_basis(random(spec.out_features, spec.in_features), spec)
