"""Stored token orders of shared tables: the clustering on planted groups, what it buys a fit, padded vocabularies, and
whole models that keep the order for the table and for the head tied to it."""

import copy

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GPT2Config

import tensorfold
from tensorfold import MPO, InputError, Kronecker, Recipe, Rule, Spec, SpecError
from tensorfold.algebra.contraction.apply import to_dense
from tensorfold.algebra.orders import token_order as orders
from tensorfold.algebra.orders.token_order import cluster_order, token_order
from tensorfold.algebra.solvers.solve import relative_error
from tensorfold.algebra.statistics import Statistics
from tensorfold.calibration.windows import token_counts
from tensorfold.export.checkpoints import export_onnx
from tensorfold.hf.dense import plain_model
from tensorfold.models.anatomy import count_parameters
from tensorfold.nn import MPOEmbedding

# name -> what makes the method, but for the order. Both pad the vocabulary of 300: to 16 · 19 and 7 · 7 · 7.
METHODS = {
    "kronecker": lambda order: Kronecker(factor=(16, 4), terms=6, pad=True, scalars=True, order=order),
    "mpo": lambda order: MPO(bond=5, out_modes=(7, 7, 7), in_modes=(2, 4, 4), order=order),
}
IDS = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(0))
BOTH = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def make(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shuffled_groups(groups, size, width, noise=0.01):
    """Rows around ``groups`` centres in a random order, and the centre of each."""
    shuffle = torch.randperm(groups * size, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(groups).repeat_interleave(size)[shuffle]
    return make(groups, width, seed=1)[labels] + noise * make(groups * size, width, seed=2), labels


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits


def folded_table(method, weight, counts=None):
    """The embedding that a method makes of a table."""
    spec = method.spec(*weight.shape)
    return MPOEmbedding.from_factors(method.solve(weight, spec, Statistics(counts=counts)), spec, weight)


@pytest.mark.parametrize("width", [1, 5, 24])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 64, 97, 300])
def test_every_row_has_one_place(rows, width):
    table = make(rows, width)
    order = cluster_order(table)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(rows))
    assert torch.equal(cluster_order(table.clone()), order)
    assert torch.equal(cluster_order(table.bfloat16()).sort().values, torch.arange(rows))


@pytest.mark.parametrize(("groups", "size"), [(16, 12), (8, 100), (2, 3)])
def test_shuffled_groups_are_found_again(groups, size):
    table, labels = shuffled_groups(groups, size, 32)
    blocks = labels[cluster_order(table)].reshape(groups, size)
    assert torch.equal(blocks, blocks[:, :1].expand_as(blocks))
    assert not torch.equal(labels.reshape(groups, size), blocks)


def test_rows_on_a_line_come_in_its_order():
    places = torch.randperm(97, generator=torch.Generator().manual_seed(0))
    order = places[cluster_order(places[:, None] * make(1, 6) + 3.0)]
    assert order.tolist() in (list(range(97)), list(range(97))[::-1])


def test_equal_rows_stay_where_they_are():
    assert torch.equal(cluster_order(torch.ones(9, 4)), torch.arange(9))
    assert torch.equal(cluster_order(torch.zeros(200, 4)), torch.arange(200))


def test_chunks_and_the_way_to_the_directions_change_nothing(monkeypatch):
    """Rows read in pieces and not; and directions by iteration against those by eigenvectors, where they are clear."""
    table = make(400, 8) * 0.3 ** torch.arange(8)
    expected = cluster_order(table)
    with monkeypatch.context() as patch:
        patch.setattr(orders, "_CHUNK", 64 * 8)
        assert torch.equal(cluster_order(table), expected)
    for small in (0, 400):
        monkeypatch.setattr(orders, "_SMALL", small)
        assert torch.equal(cluster_order(table), expected)


@pytest.mark.parametrize("table", [torch.ones(3), torch.ones(0, 4), torch.tensor([[1.0], [float("nan")]])], ids=str)
def test_what_is_no_table_is_refused(table):
    with pytest.raises(SpecError, match=r"needed \(rows, width\), without NaN"):
        cluster_order(table)


def test_frequent_tokens_first():
    table = make(5, 3)
    assert token_order("own", table) is None
    assert token_order("frequency", table, torch.tensor([2, 0, 7, 2, 9])).tolist() == [4, 2, 0, 3, 1]
    assert torch.equal(token_order("cluster", table), cluster_order(table))
    for counts in (None, torch.ones(4)):
        with pytest.raises(SpecError, match="each of the 5 tokens"):
            token_order("frequency", table, counts)


@pytest.mark.parametrize(
    "method",
    [
        lambda order: Kronecker(factor=(16, 32), order=order),
        lambda order: Kronecker(factor=(32, 16), terms=3, order=order),
        lambda order: MPO(bond=8, out_modes=(16, 12), in_modes=(4, 8), order=order),
    ],
    ids=["kronecker", "kronecker-3", "mpo"],
)
def test_clustering_finds_the_order_that_a_fit_can_share(method):
    """At equal parameters, on rows that are groups but for their order."""
    table, labels = shuffled_groups(16, 12, 32)
    own, clustered, sorted_ = (
        relative_error(weight, folded_table(method(order), weight).to_dense().detach())
        for weight, order in ((table, "own"), (table, "cluster"), (table[labels.argsort(stable=True)], "own"))
    )
    specs = [method(order).spec(192, 32) for order in ("own", "cluster")]
    assert specs[0].parameters == specs[1].parameters
    assert specs[1].reordered == ("out",)
    assert own > 0.5
    assert clustered < 0.3 * own
    assert clustered == pytest.approx(sorted_, abs=0.03)


@pytest.mark.parametrize("name", METHODS)
def test_an_order_that_is_the_tokens_own_changes_nothing(name):
    table, falling = make(300, 32), torch.arange(300, 0, -1)
    own, frequent = (folded_table(METHODS[name](order), table, falling) for order in ("own", "frequency"))
    assert own.out_position is None
    assert torch.equal(frequent.out_position, torch.arange(300))
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), frequent.parameters(), strict=True))
    assert torch.equal(own(IDS), frequent(IDS))


@pytest.mark.parametrize("order", ["own", "frequency", "cluster"])
@pytest.mark.parametrize(
    "method",
    [
        lambda order: Kronecker(factor=(8, 16), terms=7, pad=True, order=order),
        lambda order: Kronecker(factor=(10, 5), terms=24, pad=True, order=order),
        lambda order: MPO(bond=24, out_modes=(6, 9), in_modes=(4, 4), order=order),
    ],
    ids=["kronecker", "kronecker-width", "mpo"],
)
def test_a_prime_vocabulary_makes_the_round_trip(method, order):
    """Of full rank, 53 tokens padded to 56, 60 and 54 come back; the rows beyond them have no token and no logit."""
    table = make(53, 16).double()
    counts = torch.randperm(53, generator=torch.Generator().manual_seed(1))
    folded = folded_table(method(order), table, counts)
    assert folded.spec.is_padded
    torch.testing.assert_close(folded.to_dense(), table)
    torch.testing.assert_close(folded(torch.arange(53)), table)
    h, head = make(3, 16).double(), folded.head()
    torch.testing.assert_close(head(h), h @ table.T)
    assert head(h).shape == (3, 53)
    if order != "own":
        assert torch.equal(folded.out_position.sort().values, torch.arange(53))


def test_padding_has_to_be_asked_for():
    spec = Spec.kronecker(50257, 768, (64, 64), pad=True)
    assert (spec.out_modes, spec.in_modes) == ((64, 786), (64, 12))
    assert (spec.out_features, spec.in_features) == (50257, 768)
    assert Spec.from_dict(spec.to_dict()) == spec
    assert Spec.kronecker(768, 64, (32, 8), pad=True) == Spec.kronecker(768, 64, (32, 8))
    with pytest.raises(SpecError, match=r"nearest divisors are 29 and 1733; pass pad=True"):
        Spec.kronecker(50257, 768, (64, 64))
    with pytest.raises(SpecError, match=r"not divisible by 60; nearest divisors are 53; needed at most 53"):
        Spec.kronecker(53, 16, (60, 4), pad=True)
    plan = tensorfold.plan(GPT2Config(), Recipe((Rule("embedding", Kronecker(factor=(64, 64), keep=0.3, pad=True)),)))
    assert 0.29 < plan.kept <= 0.3


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_the_dense_tables(name):
    table = folded_table(METHODS[name]("cluster"), make(300, 32).double())
    head, dense = table.head(), table.to_dense().detach().requires_grad_()
    weights, h = make(2, 24, 32).double(), make(5, 32).double()
    ((table(IDS) * weights).sum() + head(h).square().sum()).backward()
    ((dense[IDS] * weights).sum() + (h @ dense.T).square().sum()).backward()
    expected = torch.autograd.grad(table.to_dense(), list(table.parameters()), dense.grad)
    for parameter, gradient in zip(table.parameters(), expected, strict=True):
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(parameter.grad, gradient)


def test_modules_can_be_made_without_memory():
    spec = Spec.kronecker(48, 16, (12, 8), reordered=("out", "in"))
    table = MPOEmbedding(spec, device="meta")
    head = table.head()
    assert all(tensor.is_meta for tensor in (*table.state_dict().values(), *head.state_dict().values()))
    assert head.state_dict().keys() == table.state_dict().keys() - {"out_position", "in_order"}
    assert head.out_position is table.out_position
    assert head.in_order is table.in_order


@pytest.fixture
def fold(tiny, tokenizer, prose):
    def folded(architecture, method, tied=True, **settings):
        model = tiny(architecture, tied=tied, **settings)
        if model.get_output_embeddings().bias is not None:
            torch.nn.init.normal_(model.get_output_embeddings().bias)
        recipe = Recipe((Rule("embedding", method),))
        return model, tensorfold.fold(model, recipe, tokenizer, [prose], calibration_tokens=300)

    return folded


@BOTH
@pytest.mark.parametrize("order", ["frequency", "cluster"])
@pytest.mark.parametrize(
    ("architecture", "name"),
    [("gpt2", "mpo"), ("llama", "kronecker"), ("gemma3", "kronecker"), ("opt", "mpo"), ("phi", "kronecker")],
)
def test_checkpoints_and_plain_models(fold, tmp_path, architecture, name, order, tied):
    model, report = fold(architecture, METHODS[name](order), tied)
    expected, table, head = logits(model), model.get_input_embeddings(), model.get_output_embeddings()
    assert expected.shape == (2, 24, 300)
    assert table.spec.is_padded
    assert table.spec.reordered == ("out",)
    assert not torch.equal(table.out_position, torch.arange(300))
    if tied:
        torch.testing.assert_close(head.to_dense(), table.to_dense(), rtol=0, atol=0)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    stored = [key for file in tmp_path.glob("*.safetensors") for key in safe_open(file, "pt").keys()]  # noqa: SIM118
    assert sum(key.endswith("out_position") for key in stored) == 1
    loaded = tensorfold.load(tmp_path)
    for each in (loaded, AutoModelForCausalLM.from_pretrained(tmp_path), copy.deepcopy(loaded)):
        assert torch.equal(logits(each), expected)
        assert count_parameters(each) == report.parameters_after
        table, head = each.get_input_embeddings(), each.get_output_embeddings()
        assert not tied or all(a is b for a, b in zip(head.cores, table.cores, strict=True))
    half = tensorfold.load(tmp_path, dtype="bfloat16").get_input_embeddings()
    assert half.cores[0].dtype == torch.bfloat16
    assert torch.equal(half.out_position, table.out_position)
    torch.testing.assert_close(logits(plain_model(loaded)), expected, rtol=1e-4, atol=1e-4)


def test_tokens_come_by_how_often_the_text_uses_them(fold, tokenizer, prose):
    model, report = fold("llama", MPO(keep=0.4, order="frequency"))
    order = token_counts(tokenizer, [prose], 300).argsort(descending=True, stable=True)
    assert torch.equal(model.get_input_embeddings().out_position[order], torch.arange(300))
    assert report.metrics == {"model.embed_tokens": "text"}


def test_clusters_need_no_text(tiny):
    model = tiny("llama")
    weight = model.get_input_embeddings().weight.detach().clone()
    method = MPO(keep=0.4, order="cluster")
    report = tensorfold.fold(model, method)
    table, order = model.get_input_embeddings(), cluster_order(weight)
    assert torch.equal(table.out_position[order], torch.arange(300))
    cores = method.solve(weight, method.spec(300, 32)).cores
    expected = relative_error(weight[order], to_dense(cores, table.spec))
    assert report.errors["model.embed_tokens"] == pytest.approx(expected, rel=1e-5)


def test_recipes_and_methods_by_themselves_fold_the_embedding(tiny):
    entry = {"targets": "embedding", "method": "kronecker", "factor": [16, 4], "pad": True, "order": "cluster"}
    alone = Kronecker(factor=(16, 4), pad=True, order="cluster")
    plans = [tensorfold.plan(tiny("llama").config, recipe) for recipe in ({"fold": [entry]}, alone)]
    assert plans[0].modules == plans[1].modules
    assert plans[0].modules["model.embed_tokens"].reordered == ("out",)
    assert plans[0].to_dict()["modules"]["model.embed_tokens"]["out_features"] == 300


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("targets", ["mlp", "attention", ["lm_head"]], ids=str)
def test_linear_layers_have_no_tokens(tiny, name, targets):
    with pytest.raises(SpecError, match=r"order: cluster sorts the tokens of embedding tables.*order: own here"):
        tensorfold.plan(tiny("gpt2", tied=False), Recipe((Rule(targets, METHODS[name]("cluster")),)))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("targets", "text"), [("embedding", False), ("positions", True)])
def test_frequency_without_anything_to_count_touches_nothing(tiny, tokenizer, prose, name, targets, text):
    model = tiny("gpt2")
    before = copy.deepcopy(model.state_dict())
    method = METHODS[name]("frequency")
    assert tensorfold.plan(model, Recipe((Rule("embedding", method),))).modules["transformer.wte"].reordered
    with pytest.raises(InputError, match=r"transformer\.w.e: .*order: frequency counts the tokens of calibration text"):
        tensorfold.fold(model, Recipe((Rule(targets, method),)), tokenizer, [prose] if text else None)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("make_method", "message"),
    [
        (lambda: Kronecker(keep=0.5, order="sorted"), r"kronecker: got order='sorted'; needed 'own', 'frequency' or"),
        (lambda: MPO(keep=0.5, order=1), r"mpo: got order=1; needed 'own', 'frequency' or 'cluster'"),
        (lambda: Kronecker(keep=0.5, pad=True), r"pad=True without factor.*Drop pad"),
        (lambda: Kronecker(factor=(8, 8), pad=True, permute="all"), r"got permute: all and pad=True; needed one"),
        (lambda: Kronecker(keep=0.5, order="cluster", permute="all"), r"got permute: all and order: cluster"),
    ],
)
def test_settings_that_are_refused(make_method, message):
    with pytest.raises(InputError, match=message):
        make_method()


def test_healing_trains_the_cores_and_keeps_the_order(fold, tokenizer, text_file):
    model, _ = fold("llama", METHODS["kronecker"]("cluster"))
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    order, before = table.out_position.clone(), [core.detach().clone() for core in table.cores]
    settings = {"steps": 2, "batch": 2, "block": 16, "lr": 1e-2, "validation_fraction": 0.2}
    tensorfold.heal(model, text_file, tokenizer=tokenizer, train="cores", **settings)
    assert not any(torch.equal(core, old) for core, old in zip(table.cores, before, strict=True))
    assert torch.equal(table.out_position, order)
    assert torch.equal(head.out_position, order)
    assert all(a is b for a, b in zip(head.cores, table.cores, strict=True))


def test_onnx_holds_the_cores(fold, tmp_path):
    model, _ = fold("llama", METHODS["kronecker"]("cluster"), num_hidden_layers=1)
    assert export_onnx(model, tmp_path / "out").difference < 1e-4
