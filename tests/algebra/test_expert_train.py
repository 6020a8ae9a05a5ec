"""The tensor train over a layer's experts."""

import pytest
import torch

from tensorfold.algebra.solvers.expert_train import fit_expert_train
from tensorfold.algebra.specs.expert_train import ExpertTrain
from tensorfold.errors import SpecError

E, M, N = 5, 14, 10


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments():
    x = drawn(E, 40, N, seed=3) * torch.linspace(0.1, 2.0, N)
    return x.mT @ x / 40


def error(weights, spec, cores, c, p):
    rest = weights - spec.dense(cores).unflatten(0, (E, M))
    return float((((rest @ c) * rest).sum((1, 2)) * p).sum() / (((weights @ c) * weights).sum((1, 2)) * p).sum()) ** 0.5


@pytest.mark.parametrize("bonds", [(6, 4), (M, 4), (6, N), (M, N)])
def test_a_train_is_found_again(bonds):
    spec = ExpertTrain(E, M, N, *bonds)
    cores = [drawn(*shape, seed=k) for k, shape in enumerate(spec.core_shapes)]
    weights = spec.dense(cores).unflatten(0, (E, M))
    for c, p in ((None, None), (moments(), torch.tensor([0.5, 0.1, 0.1, 0.2, 0.1]))):
        found, errors = fit_expert_train(weights, spec, c, p)
        torch.testing.assert_close(spec.dense(found), spec.dense(cores), rtol=1e-5, atol=1e-5)
        assert errors[-1] < 1e-6


@pytest.mark.parametrize("bonds", [(6, 4), (M, 4), (6, N)])
def test_text_lowers_its_own_error_and_rounds_never_raise_it(bonds):
    spec, weights, c = ExpertTrain(E, M, N, *bonds), drawn(E, M, N, seed=7), moments()
    p = torch.tensor([0.5, 0.1, 0.1, 0.2, 0.1], dtype=torch.float64)
    plain, _ = fit_expert_train(weights, spec)
    found, errors = fit_expert_train(weights, spec, c, p)
    assert error(weights, spec, found, c, p) < 0.95 * error(weights, spec, plain, c, p)
    assert errors[-1] == pytest.approx(error(weights, spec, found, c, p), rel=1e-6)
    assert list(errors) == sorted(errors, reverse=True)


def test_without_text_a_shared_basis_of_the_inputs_is_that_of_all_experts_stacked():
    spec, weights = ExpertTrain(E, M, N, M, 4), drawn(E, M, N, seed=7)
    found, _ = fit_expert_train(weights, spec)
    u, s, v = torch.linalg.svd(weights.flatten(0, 1), full_matrices=False)
    torch.testing.assert_close(spec.dense(found), u[:, :4] * s[:4] @ v[:4], rtol=1e-6, atol=1e-6)


def test_an_expert_of_many_tokens_is_fitted_best():
    spec, weights = ExpertTrain(E, M, N, M, 3), drawn(E, M, N, seed=7)
    shares = torch.tensor([0.96, 0.01, 0.01, 0.01, 0.01])
    found, _ = fit_expert_train(weights, spec, shares=shares)
    even, _ = fit_expert_train(weights, spec)
    first = [(weights - spec.dense(cores).unflatten(0, (E, M)))[0].norm() for cores in (found, even)]
    assert first[0] < 0.9 * first[1]


def test_sizes_that_no_train_has_are_refused():
    with pytest.raises(SpecError, match="at most 14 and 10"):
        ExpertTrain(E, M, N, 15, 3)
    with pytest.raises(SpecError, match="weights of shape"):
        fit_expert_train(drawn(E, N, M), ExpertTrain(E, M, N, 2, 2))
