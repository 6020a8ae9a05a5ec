"""The search for contraction paths, and the layers that follow it: traced, cached, calibrated."""

import copy
import io
import json

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from market import MARKET, paths_of
from tensorfold.algebra.contraction.apply import apply, to_dense
from tensorfold.algebra.contraction.costs import Machine
from tensorfold.algebra.contraction.paths import Form, Order, cheapest_order
from tensorfold.algebra.contraction.search import LARGEST_BUILT, fastest_path
from tensorfold.algebra.specs.spec import Spec
from tensorfold.errors import InputError
from tensorfold.nn import MPOEmbedding, MPOLinear, cache_matrices, calibrate_machine
from tensorfold.nn import machine_speeds as machines

EXPANDING = Spec.kronecker(3072, 768, (768, 768))
CONTRACTING = Spec.kronecker(768, 3072, (768, 768))
PICO = Spec.from_modes((8, 16), (8, 16), 16)
MANY_TERMS = Spec.kronecker(48, 24, (16, 8), 9)


SMALL = {
    "kronecker": Spec.kronecker(4, 8, (2, 4)),
    "terms": Spec.kronecker(6, 4, (2, 2), 3),
    "low-rank": Spec.low_rank(7, 5, 3),
    "mpo": Spec.from_modes((2, 2, 2), (2, 1, 3), 3),
    "padded": Spec.from_modes((2, 3), (2, 2), 2, 5, 3),
    "outer": Spec((2, 3), (1, 4), (1,)),
}


@pytest.mark.parametrize("spec", SMALL.values(), ids=SMALL)
def test_gradients_of_every_path_are_derivatives(spec):
    torch.manual_seed(0)
    cores = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in spec.core_shapes]
    bias = torch.randn(spec.out_features, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, spec.in_features, dtype=torch.float64, requires_grad=True)
    for path in paths_of(spec):

        def call(x, bias, *cores, path=path):
            return apply(x, cores, spec, bias, path)

        assert torch.autograd.gradcheck(call, (x, bias, *cores))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("tokens", [1, 128, 1024])
@pytest.mark.parametrize("spec", [EXPANDING, CONTRACTING], ids=["expanding", "contracting"])
def test_kronecker_products_copy_no_activations(spec, tokens, training):
    path = fastest_path(spec, tokens, training)
    assert spec.macs <= path.macs < 1.05 * spec.macs  # a product with a small factor makes eight rows at a time
    assert path.permutation is None
    assert all(step.permutation is None for step in path.steps)


class Calls(TorchDispatchMode):
    """The names of the operators that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_what_the_layout_does_not_copy_is_not_copied():
    """Batched products too: torch's ``matmul`` would copy the state of one whose core is a parameter."""
    forms = set()
    for spec in (EXPANDING, CONTRACTING, Spec.kronecker(48, 24, (8, 4))):
        layer = MPOLinear(spec).eval()
        for machine in (Machine(), Machine(permuted=1.0)):
            path = fastest_path(spec, 64, machine=machine)
            forms |= {step.form for step in path.steps}
            assert path.permutation is None
            assert not any(step.permutation or step.core_axes for step in path.steps)
            with torch.no_grad(), Calls() as calls:
                apply(torch.randn(64, spec.in_features), layer.factors(), spec, layer.bias, path)
            assert not {"clone", "copy_", "contiguous", "_to_copy", "cat", "constant_pad_nd"} & set(calls.names)
    assert forms - {Form.ROWS}


def test_the_number_of_tokens_decides():
    assert not fastest_path(EXPANDING, 4096).materialises
    assert PICO.macs > PICO.dense_parameters
    for training in (False, True):
        assert fastest_path(PICO, 4096, training).materialises
        assert not fastest_path(PICO, 1, training).materialises
    assert str(fastest_path(PICO, 4096)) == "materialise"
    assert str(fastest_path(CONTRACTING, 1)) == "1→0"


def test_large_tables_are_never_built():
    table = Spec.kronecker(30720, 768, (10240, 256), 4)
    small = Spec.kronecker(3072, 768, (1024, 256), 4)
    assert table.dense_parameters > LARGEST_BUILT > small.dense_parameters
    assert fastest_path(small, 4096).materialises
    assert not fastest_path(table, 4096).materialises
    assert fastest_path(table, 4096, force="materialise").materialises


@pytest.mark.parametrize(
    "spec", [*MARKET.values(), EXPANDING, PICO, Spec.from_modes((8, 8, 8), (4, 4, 8), 32)], ids=str
)
def test_training_keeps_no_more_than_a_dense_layer(spec):
    for tokens in (1, 64, 4096):
        path = fastest_path(spec, tokens, training=True)
        assert path.kept <= tokens * (spec.in_features + spec.out_features) + spec.dense_parameters


def test_what_a_path_says_it_keeps_is_what_autograd_keeps():
    """Saved tensors that are neither the input nor a parameter, counted by autograd's own hooks."""
    for spec in (PICO, EXPANDING, Spec.low_rank(64, 48, 8), MANY_TERMS):
        for force in (None, "materialise", cheapest_order(spec.out_modes, spec.in_modes, spec.ranks)):
            layer = MPOLinear(spec, bias=True)
            layer.way = force
            x = torch.randn(32, spec.in_features, requires_grad=True)
            known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
            saved = {}

            def pack(t, known=known, saved=saved):
                if t.untyped_storage().data_ptr() not in known:
                    saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // 4
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                layer(x).sum()
            assert sum(saved.values()) <= layer.chosen(32, training=True).kept + 64


def test_wrong_ways_are_refused():
    layer = MPOLinear(PICO)
    for way in ("fastest", Order(0, "L", 0), Order(0, "RR", 0), Order(1, "R", 0)):
        layer.way = way
        with pytest.raises(InputError, match="way"):
            layer(torch.randn(1, 128))


def test_a_way_can_be_set_and_seen():
    layer = MPOLinear(PICO)
    x = torch.randn(3, 128)
    expected = layer(x)
    for way, shown in (("materialise", "materialise"), (Order(0, "R", 0), "0→1"), (Order(1, "L", 0), "1→0")):
        layer.way = way
        assert str(layer.chosen(3)) == shown
        torch.testing.assert_close(layer(x), expected)
    layer.way = None
    assert layer.chosen(5) is layer.chosen(8) is not layer.chosen(9)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("way", [None, "chain", "materialise"])
@pytest.mark.parametrize("spec", MARKET.values(), ids=MARKET)
def test_autocast_gives_what_a_dense_layer_gives(spec, way, grad):
    torch.manual_seed(1)
    layer, dense = MPOLinear(spec), nn.Linear(spec.in_features, spec.out_features)
    layer.way = way
    with torch.no_grad():
        dense.weight.copy_(layer.to_dense())
        dense.bias.copy_(layer.bias)
    x = torch.randn(3, spec.in_features)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        y, expected = layer(x), dense(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected.float(), rtol=0.05, atol=0.05 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("spec", [PICO, Spec.kronecker(48, 16, (12, 8)), MARKET["reordered"]], ids=str)
def test_one_graph_serves_every_number_of_tokens(spec, grad):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    layer = MPOLinear(spec)
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    with torch.set_grad_enabled(grad):
        for tokens in (3, 40, 700, 5000):
            x = torch.randn(tokens, spec.in_features)
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


def test_an_exported_layer_takes_any_number_of_tokens():
    layer = MPOLinear(PICO).eval()
    x = torch.randn(4, 128)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    for tokens in (2, 900, 3000):
        x = torch.randn(tokens, 128)
        torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-4, atol=1e-4)


def test_a_static_graph_takes_the_path_of_its_length():
    torch._dynamo.reset()
    layer = MPOLinear(PICO)
    seen = []

    def backend(graph, inputs):
        seen.append(len(graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)
    for tokens in (1, 2048):
        compiled(torch.randn(tokens, 128))
    assert len(seen) == 2
    assert seen[0] != seen[1]


@pytest.fixture
def cached():
    """A layer that is faster as a matrix at a few tokens, holding it; and a batch of inputs."""
    torch.manual_seed(2)
    layer = MPOLinear(MARKET["reordered"]).eval()
    layer.out_position.copy_(torch.randperm(24))
    layer.in_order.copy_(torch.randperm(20))
    assert cache_matrices(layer, 1) == {"": 24 * 20 * 4}
    return layer, torch.randn(5, 20)


def expected(layer, x):
    with torch.no_grad():
        return x @ layer.to_dense().T + layer.bias


@torch.no_grad()
def test_a_cached_matrix_follows_its_cores(cached):
    layer, x = cached
    torch.testing.assert_close(layer(x), expected(layer, x))
    held = layer._matrix
    assert held is not None
    layer(x)
    assert layer._matrix is held  # nothing changed, so it was not made again
    layer.cores[0].mul_(3)
    torch.testing.assert_close(layer(x), expected(layer, x))
    layer.load_state_dict({name: torch.randn_like(t) if t.is_floating_point() else t
                           for name, t in layer.state_dict().items()})  # fmt: skip
    torch.testing.assert_close(layer(x), expected(layer, x))
    layer.to(torch.float64)
    assert layer._matrix is None
    torch.testing.assert_close(layer(x.double()), expected(layer, x.double()))


def test_a_cached_matrix_takes_no_part_in_training_copies_or_files(cached):
    layer, x = cached
    with torch.no_grad():
        layer(x)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    twin = copy.deepcopy(layer)
    assert twin._matrix is None
    assert layer._matrix is not None
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert again._matrix is None
    with torch.no_grad():
        torch.testing.assert_close(again(x), layer(x))
    assert set(layer.state_dict()) == set(MPOLinear(layer.spec).state_dict())
    layer.train()
    assert layer._matrix is None


def test_matrices_are_cached_within_the_limit():
    model = nn.ModuleDict({name: MPOLinear(spec) for name, spec in MARKET.items()})
    model["expanding"] = MPOLinear(EXPANDING, device="meta")
    everything = cache_matrices(model, 1000)
    assert "expanding" not in everything
    assert len(everything) > 10
    for limit in (0.003, 0.02):
        chosen = cache_matrices(model, limit)
        assert 0 < sum(chosen.values()) <= limit * 1e6 < sum(everything.values())
        assert {name for name, layer in model.items() if layer.holds_matrix} == set(chosen)
    assert cache_matrices(model, 0) == {}
    assert not any(layer.holds_matrix for layer in model.values())
    with pytest.raises(InputError, match="megabytes"):
        cache_matrices(model, -1)


def test_the_head_of_a_table_takes_its_own_path():
    head = MPOEmbedding(Spec.low_rank(300, 16, 4)).head(torch.zeros(300))
    x = torch.randn(7, 16)
    assert not head.chosen(1024).materialises
    torch.testing.assert_close(head(x), x @ head.to_dense().T)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORFOLD_CACHE", str(tmp_path))
    machines.machine.cache_clear()
    yield tmp_path
    machines.machine.cache_clear()


def test_speeds_are_measured_only_when_asked_for(empty_cache):
    assert machines.machine("cpu", torch.float32, 1) == Machine()
    MPOLinear(PICO)(torch.randn(2, 128))
    assert not list(empty_cache.rglob("*.json"))
    measured = calibrate_machine()
    assert measured != Machine()
    assert machines.machine("cpu", torch.float32, torch.get_num_threads()) == measured
    assert machines.machine("cpu", torch.float64, torch.get_num_threads()) == Machine()
    machines.machine.cache_clear()  # as another process would find it
    assert machines.machine("cpu", torch.float32, torch.get_num_threads()) == measured


def test_a_damaged_file_of_speeds_is_named(empty_cache):
    calibrate_machine()
    [file] = empty_cache.rglob("machine.json")
    assert json.loads(file.read_text())["macs"] > 0
    for text in ("{", "[]", "{}", '{"macs": -1}'):
        file.write_text(text)
        machines.machine.cache_clear()
        with pytest.raises(InputError, match=r"machine\.json"):
            machines.machine("cpu", torch.float32, torch.get_num_threads())


def test_products_of_many_small_terms_are_spread():
    """The blocked product that builds the matrix of a sum of Kronecker products, against the definition."""
    spec = Spec.kronecker(3 * 96, 3 * 80, (96, 80), 4)
    torch.manual_seed(3)
    a, b = (torch.randn(shape, dtype=torch.float64) for shape in spec.core_shapes)
    terms = sum(torch.kron(a[0, :, :, k].contiguous(), b[k, :, :, 0].contiguous()) for k in range(4))
    torch.testing.assert_close(to_dense([a, b], spec), terms)
