"""One MPS a token: counts as published, decompositions as a plain per-row TT-SVD gives them, the contracts of embedding
and tied head, new tokens, and a head that never holds its table."""

import copy
import math

import numpy
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tensorfold.algebra.solvers.token_mps import token_mps_svd
from tensorfold.algebra.specs.modes import powers_of_two
from tensorfold.algebra.specs.registry import spec_from_dict
from tensorfold.algebra.specs.token_mps import TokenMPSSpec, rows
from tensorfold.errors import SpecError
from tensorfold.methods import LowRank, TokenMPS
from tensorfold.nn import FoldedModule, MPOLinear, TokenMPSEmbedding, TokenMPSHead

TEN = (2,) * 10
VOCABULARY, CHUNK = 23, 5  # rows of the market's tables, and of a head's chunk, which does not divide them

# name -> width, modes, rank: padded or not, few sites and many, truncated at one side of the Gram matrix or the other.
MARKET = {
    "twos-1": (32, (2,) * 5, 1),
    "twos-2": (32, (2,) * 5, 2),
    "twos-3": (32, (2,) * 5, 3),
    "twos-full": (32, (2,) * 5, 4),
    "padded": (27, (2,) * 5, 2),
    "padded-full": (27, (2,) * 5, 4),
    "tensorslm": (48, (3, 2, 2, 2, 2), 1),
    "wide-first": (48, (12, 2, 2), 2),
    "wide-last": (48, (2, 2, 12), 3),
    "two-sites": (48, (6, 8), 3),
    "two-sites-full": (48, (6, 8), 6),
    "one-site": (7, (7,), 1),
    "ones": (12, (1, 3, 1, 4, 1), 2),
}


@pytest.fixture(params=MARKET, ids=str)
def spec(request):
    width, modes, rank = MARKET[request.param]
    return TokenMPSSpec(VOCABULARY, width, modes, rank)


@pytest.fixture
def table(spec):
    return torch.randn(spec.vocabulary, spec.width, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def embedding(spec, table):
    return TokenMPSEmbedding.from_dense(table, spec)


def head_of(embedding, bias=None):
    """A tied head that rebuilds ``CHUNK`` rows at a time."""
    return embedding.head(bias, chunk_bytes=CHUNK * embedding.spec.padded_width * 4)


def reference(row, modes, rank):
    """TT-SVD of one row, by the book: an SVD of each unfolding, in numpy."""
    rest = numpy.pad(row, (0, math.prod(modes) - len(row)))[None]
    cores, left = [], 1
    for k, mode in enumerate(modes[:-1]):
        u, s, v = numpy.linalg.svd(rest.reshape(left * mode, -1), full_matrices=False)
        keep = min(rank, math.prod(modes[: k + 1]), math.prod(modes[k + 1 :]))
        cores.append(u[:, :keep].reshape(left, mode, keep))
        rest, left = s[:keep, None] * v[:keep], keep
    out = numpy.ones((1, 1))
    for core in (*cores, rest.reshape(left, modes[-1], 1)):
        out = numpy.tensordot(out, core, 1).reshape(-1, core.shape[2])
    return out[: len(row), 0]


@pytest.mark.parametrize(
    ("rank", "parameters", "factor"),
    [(1, 20, 38.40), (2, 72, 10.67), (3, 140, 5.49), (4, 232, 3.31), (5, 320, 2.40), (6, 424, 1.81), (8, 680, 1.13)],
)
def test_counts_as_published(rank, parameters, factor):
    """TensorGPT's factors on a width of 768 padded to 2^10."""
    spec = TokenMPS(rank=rank, modes=TEN).spec(50257, 768)
    assert spec == TokenMPSSpec(50257, 768, TEN, rank)
    assert spec.parameters_per_token == parameters
    assert spec.parameters == 50257 * parameters
    assert round(spec.factor, 2) == factor
    assert TokenMPS(keep=parameters / 768, modes=TEN).spec(50257, 768) == spec


def test_counts_of_the_second_version():
    assert TokenMPSSpec(50257, 768, (3,) + (2,) * 8, 1).parameters_per_token == 19


def test_a_budget_takes_the_largest_rank_that_meets_it():
    for keep, rank in ((0.0261, 1), (0.05, 1), (0.1, 2), (0.303, 4), (0.302, 3), (0.99, 8)):
        spec = TokenMPSSpec.within(100, 768, TEN, keep)
        assert spec.rank == rank
        assert spec.parameters <= keep * spec.dense_parameters
        assert TokenMPSSpec(100, 768, TEN, rank + 1).parameters > keep * spec.dense_parameters
    with pytest.raises(SpecError, match=r"leaves 19 of 768 numbers a token.* keep at least 0\.0261"):
        TokenMPSSpec.within(100, 768, TEN, 0.026)


def test_spec_is_its_cores(spec):
    assert spec.parameters == sum(math.prod(shape) for shape in spec.core_shapes)
    assert spec.ranks == tuple(
        min(spec.rank, math.prod(spec.modes[:k]), math.prod(spec.modes[k:])) for k in range(1, spec.sites)
    )
    assert spec_from_dict(spec.to_dict()) == spec
    module = TokenMPSEmbedding(spec, device="meta")
    assert sum(parameter.numel() for parameter in module.parameters()) == spec.parameters
    assert tuple(tuple(core.shape) for core in module.cores) == spec.core_shapes


def test_multiply_adds_are_the_specs(embedding, spec):
    from torch.utils.flop_counter import FlopCounterMode

    head = head_of(embedding)
    with torch.no_grad(), FlopCounterMode(display=False) as lookup:
        embedding(torch.arange(3))
    assert lookup.get_total_flops() == 2 * 3 * spec.row_macs
    with torch.no_grad(), FlopCounterMode(display=False) as logits:
        head(torch.randn(1, spec.width))
    assert logits.get_total_flops() == 2 * spec.macs


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((10, 768, (2,) * 9, 1), "product is 512.*at least 768"),
        ((10, 768, TEN, 33), "largest attainable is 32"),
        ((10, 7, (7,), 2), "largest attainable is 1"),
        ((10, 768, (), 1), "modes="),
        ((10, 768, (2, -3), 1), "modes="),
        ((0, 768, TEN, 1), "vocabulary=0"),
        ((10, 768, TEN, 1.5), "rank=1.5"),
        ((10, 768, 7, 1), "modes=7"),
    ],
)
def test_bad_shapes_are_refused(arguments, words):
    with pytest.raises(SpecError, match=words):
        TokenMPSSpec(*arguments)


def test_bad_descriptions_are_refused():
    good = TokenMPSSpec(10, 8, (2, 4), 2).to_dict()
    for data in (
        {**good, "ranks": [2]},
        {key: good[key] for key in ("vocabulary", "modes", "rank")},
        {**good, "modes": 8},
    ):
        with pytest.raises(SpecError, match="TokenMPSSpec"):
            spec_from_dict(data)


def test_every_row_has_its_own_tt_svd(spec, table):
    expected = torch.tensor(numpy.stack([reference(row.double().numpy(), spec.modes, spec.rank) for row in table]))
    got = rows(token_mps_svd(table.double(), spec), spec.split)[:, : spec.width]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    single = rows(token_mps_svd(table, spec), spec.split)[:, : spec.width].double()
    error, reached = ((each - table.double()).norm(dim=1) for each in (expected, single))
    torch.testing.assert_close(reached, error, rtol=1e-5, atol=1e-5)
    full = spec.rank == spec.largest_rank
    assert bool((error < 1e-12).all()) is full
    # Norms are shared out evenly over the cores of every token.
    norms = torch.stack([core.flatten(1).norm(dim=1) for core in token_mps_svd(table, spec)])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))


def test_rank_deficient_rows_are_no_trouble():
    """Zero, constant, one-hot and structured rows: a Kronecker product of pairs is exact at rank 1."""
    spec = TokenMPSSpec(4, 64, (2,) * 6, 1)
    pairs = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    structured = pairs[0]
    for pair in pairs[1:]:
        structured = torch.kron(structured, pair)
    table = torch.stack([torch.zeros(64), torch.ones(64), torch.eye(64)[37], structured])
    for rank in (1, 3, 8):
        embedding = TokenMPSEmbedding.from_dense(table, TokenMPSSpec(4, 64, spec.modes, rank))
        torch.testing.assert_close(embedding.to_dense().detach(), table, rtol=1e-5, atol=1e-6)


def test_rows_do_not_depend_on_the_others(spec, table, monkeypatch):
    """The same cores in one piece, in chunks, or divided over workers."""
    whole = token_mps_svd(table, spec)
    parts = [token_mps_svd(part, TokenMPSSpec(len(part), spec.width, spec.modes, spec.rank)) for part in table.split(9)]
    monkeypatch.setattr("tensorfold.algebra.solvers.token_mps._CHUNK", 4 * spec.padded_width)
    chunked = token_mps_svd(table, spec)
    for k, core in enumerate(whole):
        torch.testing.assert_close(torch.cat([part[k] for part in parts]), core, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(chunked[k], core, rtol=1e-6, atol=1e-6)


def test_unusable_tables_are_refused(spec, table):
    with pytest.raises(SpecError, match="the spec needs"):
        token_mps_svd(table[1:], spec)
    table[3, 0] = torch.inf
    with pytest.raises(SpecError, match="NaN or infinity"):
        token_mps_svd(table, spec)


def test_a_lookup_is_the_rows_asked_for(spec, table):
    embedding = TokenMPSEmbedding.from_dense(table, spec, scale=2.0)
    dense = embedding.to_dense()
    assert dense.shape == table.shape
    assert isinstance(embedding, FoldedModule)
    assert not hasattr(embedding, "weight")
    for index in (torch.tensor([[3, 22, 3], [0, 1, 1]]), torch.tensor(5), torch.zeros(0, dtype=torch.long)):
        torch.testing.assert_close(embedding(index), 2.0 * dense[index])
    with pytest.raises(IndexError):
        embedding(torch.tensor([VOCABULARY]))


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no-bias"])
def test_the_tied_head_is_the_tables_product(embedding, spec, biased):
    bias = torch.randn(VOCABULARY) if biased else None
    head = head_of(embedding, bias)
    assert isinstance(head, TokenMPSHead)
    assert isinstance(head, FoldedModule)
    assert [name for name, _ in head.named_parameters()] == [
        *(["bias"] if biased else []),
        *(name for name, _ in embedding.named_parameters()),
    ]
    assert all(a is b for a, b in zip(head.cores, embedding.cores, strict=True))
    assert len(head.chunks()) == -(-VOCABULARY // CHUNK)
    h = torch.randn(2, 3, spec.width)
    expected = h @ head.to_dense().T + (bias if biased else 0)
    torch.testing.assert_close(head(h), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(head(h), head_of(embedding, bias)(h))
    assert head(h[:0]).shape == (0, 3, VOCABULARY)


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no-bias"])
def test_gradients_are_the_dense_ones(embedding, spec, biased):
    """Of a loss through both ends, so that what the two add up to is compared."""
    embedding = embedding.double()
    head = head_of(embedding, torch.randn(VOCABULARY, dtype=torch.float64) if biased else None)
    index, h = torch.tensor([[3, 22, 3], [0, 1, 7]]), torch.randn(2, 3, spec.width, dtype=torch.float64)
    h.requires_grad_()

    def gradients(logits, vectors):
        loss = logits.logsumexp(-1).sum() + (vectors * h).square().sum()
        return torch.autograd.grad(loss, [h, *head.parameters()])

    dense = embedding.to_dense()
    expected = gradients(h @ dense.T + (head.bias if biased else 0), dense[index])
    for got, wanted in zip(gradients(head(h), embedding(index)), expected, strict=True):
        torch.testing.assert_close(got, wanted)
        assert wanted.abs().sum() > 0
    head.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(head(h).sum(), h)[0], dense.sum(0).expand_as(h).detach())
    if biased:
        head.bias.requires_grad_()
        assert torch.autograd.grad(head(h).sum(), head.bias)[0].tolist() == [6] * VOCABULARY


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(embedding, spec, dtype):
    half = copy.deepcopy(embedding).to(dtype)
    head, h = head_of(half), torch.randn(4, spec.width, dtype=dtype, requires_grad=True)
    expected = h.double() @ half.to_dense(torch.float64).T
    logits = head(h)
    assert logits.dtype == half(torch.tensor([1])).dtype == dtype
    scale = 50 * torch.finfo(dtype).eps
    torch.testing.assert_close(logits.double(), expected, rtol=scale, atol=scale * float(expected.detach().abs().max()))
    logits.sum().backward()
    assert h.grad.dtype == half.cores[0].grad.dtype == dtype


def test_autocast_reaches_the_head_and_its_gradients(embedding, spec):
    head, h = head_of(embedding, torch.randn(VOCABULARY)), torch.randn(4, spec.width)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(h)
    assert logits.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    assert {parameter.grad.dtype for parameter in head.parameters()} == {torch.float32}
    found = [parameter.grad.clone() for parameter in head.parameters()]
    exact = torch.autograd.grad((h @ head.to_dense().T + head.bias).square().sum(), list(head.parameters()))
    for got, wanted in zip(found, exact, strict=True):
        assert (got - wanted).norm() < 0.03 * wanted.norm()


class Sizes(TorchDispatchMode):
    """Bytes and shape of every tensor that an operation makes anew."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view and not function._schema.is_mutable and isinstance(out, torch.Tensor):
            self.made.append((out.nbytes, tuple(out.shape)))
        return out


@pytest.mark.parametrize("trains", [True, False], ids=["training", "inference"])
def test_the_head_holds_a_chunk_and_never_the_table(trains):
    spec = TokenMPSSpec(400, 64, (2,) * 6, 3)
    embedding, bound = TokenMPSEmbedding(spec), 25 * 64 * 4
    head, h = embedding.head(chunk_bytes=bound), torch.randn(3, 64, requires_grad=trains)
    with Sizes() as sizes, torch.set_grad_enabled(trains):
        logits = head(h)
        if trains:
            logits.sum().backward()
    kept = {(3, 400), (400,), *spec.core_shapes}  # logits, and the gradients that are asked for
    temporary = [size for size, shape in sizes.made if shape not in kept]
    assert max(temporary) == bound  # a chunk is seen, and nothing above it
    with Sizes() as dense:
        h @ head.to_dense().T
    assert max(size for size, shape in dense.made if shape not in kept) >= 400 * 64 * 4


def test_new_tokens_leave_the_others_as_they_are(embedding, spec):
    head = head_of(embedding)
    before = [core.detach().clone() for core in embedding.cores]
    index, h = torch.arange(VOCABULARY), torch.randn(4, spec.width)
    logits, old_rows = head(h).detach(), embedding(index).detach()
    new = torch.randn(3, spec.width, generator=torch.Generator().manual_seed(9))
    embedding.append(new)
    assert embedding.num_embeddings == head.out_features == VOCABULARY + 3
    assert embedding.spec == head.spec == TokenMPSSpec(VOCABULARY + 3, spec.width, spec.modes, spec.rank)
    for core, old in zip(embedding.cores, before, strict=True):
        assert torch.equal(core[:VOCABULARY], old)
    assert torch.equal(embedding(index), old_rows)
    torch.testing.assert_close(head(h)[:, :VOCABULARY], logits)  # the last chunk is of another size
    alone = TokenMPSEmbedding.from_dense(new, TokenMPSSpec(3, spec.width, spec.modes, spec.rank))
    torch.testing.assert_close(embedding(torch.arange(VOCABULARY, VOCABULARY + 3)), alone.to_dense())
    (head(h).sum() + embedding(index).sum()).backward()
    assert all(core.grad.shape == core.shape for core in embedding.cores)


def test_new_tokens_that_do_not_fit_are_refused(embedding, spec):
    for vectors in (torch.randn(spec.width), torch.randn(2, spec.width + 1), torch.randn(0, spec.width)):
        with pytest.raises(SpecError, match="one row for each new token"):
            embedding.append(vectors)
    with pytest.raises(SpecError, match="NaN or infinity"):
        embedding.append(torch.full((1, spec.width), torch.nan))
    assert embedding.num_embeddings == VOCABULARY


def test_state_copies_and_meta(embedding, spec):
    index = torch.arange(VOCABULARY)
    other = TokenMPSEmbedding(spec, device="meta").to_empty(device="cpu")
    other.load_state_dict(embedding.state_dict())
    pair = torch.nn.ModuleList([embedding, head_of(embedding)])
    twin, its_head = copy.deepcopy(pair)
    assert torch.equal(other(index), embedding(index))
    assert torch.equal(twin(index), embedding(index))
    assert its_head.cores[0] is twin.cores[0] is not embedding.cores[0]
    meta = head_of(TokenMPSEmbedding(spec, device="meta"))
    assert meta(torch.empty(2, spec.width, device="meta")).shape == (2, VOCABULARY)


def test_random_rows_have_the_asked_for_variance(spec):
    torch.manual_seed(5)
    embedding = TokenMPSEmbedding(TokenMPSSpec(20000, spec.width, spec.modes, spec.rank))
    assert float(embedding.to_dense().detach().square().mean()) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_graph_breaks(dynamic):
    torch._dynamo.reset()
    embedding = TokenMPSEmbedding(TokenMPSSpec(VOCABULARY, 27, (4, 4, 2), 3))
    head = embedding.head(torch.randn(VOCABULARY), chunk_bytes=12 * 32 * 4)
    options = {"fullgraph": True, "dynamic": dynamic, "backend": "eager"}
    for tokens in (1, 4):
        index, h = torch.arange(tokens), torch.randn(tokens, 27)
        torch.testing.assert_close(torch.compile(embedding, **options)(index), embedding(index))
        torch.testing.assert_close(torch.compile(head, **options)(h), head(h))


def test_the_method_checks_its_settings():
    assert powers_of_two(768) == TEN
    assert TokenMPS(modes=(3, 16, 16), rank=2).spec(10, 768).modes == (3, 16, 16)
    assert TokenMPS.tables_only
    assert not LowRank.tables_only
    for settings in ({}, {"rank": 2, "keep": 0.3}, {"rank": 0}, {"keep": 0.0}, {"rank": 1, "modes": (0, 2)}):
        with pytest.raises(ValueError, match="token-mps"):
            TokenMPS(**settings)
    assert isinstance(MPOLinear(LowRank(rank=1).spec(4, 4)), FoldedModule)
