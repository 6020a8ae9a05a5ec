"""Graded low rank: counts by hand, the solver against PCA and against its own sweeps, embedding and tied head against
the dense table, and whole models that keep the order of their tokens."""

import copy
import itertools

import pytest
import torch
from torch.autograd import gradcheck

from tensorfold.algebra.solvers.graded import _basis, _moment, graded_low_rank
from tensorfold.algebra.solvers.solve import Factors
from tensorfold.algebra.specs.graded import GradedSpec
from tensorfold.algebra.specs.spec import Spec
from tensorfold.errors import SpecError
from tensorfold.nn import FoldedModule, GradedEmbedding, GradedHead, MPOEmbedding

VOCABULARY, WIDTH = 40, 12

# name -> classes, parameters: counted by hand.
MARKET = {
    "low-rank": (((40, 5),), 40 * 5 + 5 * 12),
    "exact": (((40, 12),), 40 * 12),
    "two-classes": (((8, 12), (32, 3)), 8 * 12 + 32 * 3 + 3 * 12),
    "graded": (((6, 9), (10, 4), (24, 1)), 6 * 9 + 10 * 4 + 24 + 9 * 12),
    "graded-exact": (((4, 12), (6, 8), (10, 5), (20, 2)), 48 + 48 + 50 + 40 + 96),
    "one-token": (((1, 12), (1, 11), (38, 1)), 12 + 11 + 38 + 11 * 12),
}


def spec_of(name):
    return GradedSpec(VOCABULARY, WIDTH, MARKET[name][0])


@pytest.fixture(params=MARKET, ids=str)
def spec(request):
    return spec_of(request.param)


def make(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def table():
    """Directions of different weight, as real tables have."""
    return make(VOCABULARY, WIDTH) @ torch.diag(0.9 ** torch.arange(WIDTH)) @ make(WIDTH, WIDTH, seed=1)


@pytest.fixture
def importance():
    """Zipf's law in an order that is not the tokens' own."""
    places = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(2))
    return 1 / (places + 1.0)


@pytest.fixture
def metric():
    inputs = make(100, WIDTH, seed=3) * torch.linspace(0.2, 3, WIDTH)
    return inputs.T @ inputs / 100


@pytest.fixture
def embedding(spec, table, importance, metric):
    return GradedEmbedding.from_dense(table, spec, importance=importance, metric=metric)


@torch.no_grad()
def weighted_error(table, approximation, importance, metric):
    difference = table.double() - approximation.double()
    return float(((difference @ metric.double()) * difference).sum(1) @ importance.double())


@pytest.mark.parametrize("name", MARKET)
def test_spec(name):
    spec = spec_of(name)
    assert spec.parameters == spec.macs == MARKET[name][1]
    assert spec.factor == VOCABULARY * WIDTH / spec.parameters
    assert GradedSpec.from_dict(spec.to_dict()) == spec
    assert (spec.out_features, spec.in_features) == (VOCABULARY, WIDTH)
    modules = GradedEmbedding(spec, device="meta"), GradedHead(spec, device="meta")
    assert all(sum(p.numel() for p in module.parameters()) == spec.parameters for module in modules)


def test_str_says_who_gets_what():
    assert str(spec_of("graded-exact")) == "Graded(4:exact, 6:8, 10:5, 20:2) × 12"


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ((), "at least one class"),
        (((40, 0),), "positive integers"),
        (((39, 3),), "hold 39 tokens of a vocabulary of 40"),
        (((20, 3), (20, 3)), "fall from class to class"),
        (((20, 3), (20, 4)), "fall from class to class"),
        (((40, 13),), "at most 12"),
        ((40, 3), "pairs"),
        (((20.0, 3), (20, 2)), "positive integers"),
    ],
)
def test_wrong_specs(classes, message):
    with pytest.raises(SpecError, match=message):
        GradedSpec(VOCABULARY, WIDTH, classes)


def test_wrong_dicts():
    for data in (3, {}, {**spec_of("exact").to_dict(), "rank": 2}):
        with pytest.raises(SpecError, match="needed classes, vocabulary, width and nothing else"):
            GradedSpec.from_dict(data)


@pytest.mark.parametrize("slope", [0.0, 0.3, 0.7, 1.5])
@pytest.mark.parametrize("keep", [0.02, 0.1, 0.302, 0.5, 0.9])
def test_budgets_are_met(keep, slope):
    spec = GradedSpec.within(5003, 96, keep, slope)
    assert spec.parameters <= keep * 5003 * 96
    assert spec.parameters > keep * 5003 * 96 - (5003 + 96 if slope == 0 else 0.1 * keep * 5003 * 96)
    assert (len(spec.classes) == 1) == (slope == 0)


def test_steeper_slopes_give_frequent_tokens_more():
    flat, steep = (GradedSpec.within(5003, 96, 0.3, slope) for slope in (0.2, 0.6))
    assert steep.classes[0][1] == flat.classes[0][1] == 96
    assert steep.classes[0][0] > flat.classes[0][0]
    assert steep.ranks[-1] < flat.ranks[-1]


def test_impossible_budgets_name_what_is_possible():
    with pytest.raises(SpecError, match=r"rank 1 already takes 5099; keep at least 0\.0107"):
        GradedSpec.within(5003, 96, 0.005, 0.5)
    assert GradedSpec.within(5003, 96, 0.0107, 0.5).ranks == (1,)


def test_one_class_is_weighted_pca(table, importance, metric):
    values, vectors = torch.linalg.eigh(metric.double())
    root = vectors * values.sqrt()
    left, s, right = torch.linalg.svd(
        importance.double().sqrt()[:, None] * (table.double() @ root), full_matrices=False
    )
    best = (left[:, :5] * s[:5] @ right[:5]) / importance.double().sqrt()[:, None] @ torch.linalg.inv(root)
    found = GradedEmbedding.from_dense(table.double(), spec_of("low-rank"), 1.0, importance, metric).to_dense()
    torch.testing.assert_close(found, best, rtol=1e-8, atol=1e-8)


def test_without_weights_one_class_is_the_svd(table):
    spec = Spec.low_rank(VOCABULARY, WIDTH, 5)
    expected = MPOEmbedding.from_dense(table.double(), spec).to_dense()
    found = GradedEmbedding.from_dense(table.double(), spec_of("low-rank"))
    torch.testing.assert_close(found.to_dense(), expected)
    assert torch.equal(found.position, torch.arange(VOCABULARY))


@pytest.mark.parametrize("spec", [spec_of(name) for name in MARKET if MARKET[name][0][0][1] == WIDTH], ids=str)
def test_rows_of_full_rank_are_kept_to_the_bit(embedding, spec, table, importance):
    frequent = importance.argsort(descending=True)[: spec.classes[0][0]]
    assert torch.equal(embedding(frequent), table[frequent])
    assert torch.equal(embedding.to_dense()[frequent], table[frequent])


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.5])
def test_graded_is_better_than_low_rank_of_as_many_numbers(keep):
    """In its own metric, against the weighted PCA, which is the best that low rank can be."""
    table = make(2000, 32) @ torch.diag(0.9 ** torch.arange(32))
    importance, metric = 1 / torch.arange(1.0, 2001.0).roll(500).sqrt(), torch.diag(torch.linspace(0.5, 2, 32))
    flat, graded = (GradedSpec.within(2000, 32, keep, slope) for slope in (0.0, 0.4))
    assert graded.parameters <= keep * 2000 * 32
    found = [GradedEmbedding.from_dense(table, spec, 1.0, importance, metric) for spec in (flat, graded)]
    low_rank, better = (weighted_error(table, each.to_dense(), importance, metric) for each in found)
    assert better < 0.95 * low_rank


def test_sweeps_only_gain(table, importance, metric):
    spec = spec_of("graded")
    errors = []
    for sweeps in (0, 1, 2, 4, 8, 30):
        module = GradedEmbedding(spec)
        module.load_factors(graded_low_rank(table, spec, importance, metric, sweeps))
        errors.append(weighted_error(table, module.to_dense(), importance, metric))
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.999 * errors[0]


def test_the_basis_is_a_local_optimum(table, importance):
    """No small rotation of the basis keeps more."""
    ranks, borders = (6, 3, 1), (0, 8, 20, 40)
    identity = torch.eye(WIDTH, dtype=torch.float64)
    rows = importance.argsort(descending=True)
    moments = [_moment(table, rows[a:b], importance.double(), identity) for a, b in itertools.pairwise(borders)]

    def kept(basis):
        return sum(float((basis[:, :r].T @ s @ basis[:, :r]).trace()) for s, r in zip(moments, ranks, strict=True))

    basis = _basis(moments, ranks, 2000)
    torch.testing.assert_close(basis.T @ basis, torch.eye(6, dtype=torch.float64))
    for seed in range(20):
        skew = make(WIDTH, WIDTH, seed=seed).double()
        assert kept(torch.linalg.matrix_exp(3e-2 * (skew - skew.T)) @ basis) < kept(basis)


def test_singular_metrics_are_no_trouble(table, importance):
    direction = make(WIDTH)
    metric = torch.outer(direction, direction)
    found = GradedEmbedding.from_dense(table, spec_of("graded"), 1.0, importance, metric).to_dense()
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found @ direction, table @ direction, rtol=1e-3, atol=1e-3)


def test_wrong_input(table, importance, metric):
    spec = spec_of("graded")
    for bad, message in (
        ((table[1:], importance, metric), r"table of shape \(39, 12\)"),
        ((table, importance[1:], metric), r"importance of shape \(39,\)"),
        ((table, importance, metric[1:]), r"metric of shape \(11, 12\)"),
        ((table * torch.nan, importance, metric), "table holds NaN"),
        ((table, importance - importance.min(), metric), "importance holds numbers that are not positive"),
    ):
        with pytest.raises(SpecError, match=message):
            graded_low_rank(bad[0], spec, *bad[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_lookup_and_head_are_those_of_the_dense_table(spec, table, importance, dtype):
    embedding = GradedEmbedding.from_dense(table.to(dtype), spec, 3.0, importance)
    assert isinstance(embedding, FoldedModule)
    assert embedding.cores[0].dtype is dtype
    dense = embedding.to_dense()
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    index = torch.arange(VOCABULARY).roll(7).reshape(5, 8)
    torch.testing.assert_close(embedding(index), 3.0 * dense[index], **tolerance)
    assert embedding(index[:0]).shape == (0, 8, WIDTH)
    bias, hidden = make(VOCABULARY).to(dtype), make(2, 3, WIDTH).to(dtype)
    head = embedding.head(bias)
    assert all(a is b for a, b in zip(head.cores, embedding.cores, strict=True))
    torch.testing.assert_close(head(hidden), hidden @ dense.T + bias, **tolerance)
    assert torch.equal(head.to_dense(), dense)
    torch.testing.assert_close(embedding.head()(hidden), hidden @ dense.T, **tolerance)


def test_gradients(spec, table, importance):
    embedding = GradedEmbedding.from_dense(table.double(), spec, importance=importance)
    head = embedding.head(make(VOCABULARY).double())
    index = torch.tensor([[0, 5, 39], [5, 17, 22]])

    def both(hidden, *cores):
        tied = {f"cores.{k}": core for k, core in enumerate(cores)}
        rows = torch.func.functional_call(embedding, tied, (index,))
        return rows, torch.func.functional_call(head, tied, (hidden,))

    assert gradcheck(both, (make(2, WIDTH).double().requires_grad_(), *embedding.cores), fast_mode=True)


def test_state_dict_keeps_the_order(embedding, spec):
    fresh = GradedEmbedding(spec)
    assert torch.equal(embedding.position.sort().values, torch.arange(VOCABULARY))
    assert not torch.equal(embedding.position, fresh.position)
    fresh.load_state_dict(copy.deepcopy(embedding.state_dict()))
    assert torch.equal(fresh.to_dense(), embedding.to_dense())
    head = GradedHead(spec)
    head.load_state_dict({**embedding.head().state_dict(), "position": embedding.position})
    assert torch.equal(head.to_dense(), embedding.to_dense())


def test_factors_without_an_order_keep_the_tokens_own(embedding):
    embedding.load_factors(Factors([core.detach().clone() for core in embedding.cores]))
    assert torch.equal(embedding.position, torch.arange(VOCABULARY))


def test_compiled_graphs_have_no_breaks(embedding):
    index, hidden = torch.tensor([[3, 1, 2]]), make(4, WIDTH)
    for module, given in ((embedding, index), (embedding.head(), hidden)):
        exported = torch.export.export(module, (given,)).module()
        torch.testing.assert_close(exported(given), module(given))


def test_norms_are_shared_evenly(table, importance):
    """Each direction's coefficients are as large as its row of the basis, so that one learning rate suits both."""
    *classes, basis = GradedEmbedding.from_dense(table, spec_of("graded"), importance=importance).cores
    squares = torch.zeros(9)
    for core in classes:
        squares[: core.shape[1]] += core.detach().square().sum(0)
    torch.testing.assert_close(squares, basis.detach().square().sum(1), rtol=1e-4, atol=1e-6)


def test_random_tables_have_the_standard_deviation_asked_for():
    table = GradedEmbedding(GradedSpec(4000, 64, ((500, 64), (1500, 24), (2000, 8))))
    torch.manual_seed(0)
    table.reset_parameters(0.02)
    assert all(0.017 < part.std() < 0.023 for part in table.to_dense().split([500, 1500, 2000]))
