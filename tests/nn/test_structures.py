"""One market of structures: shape, cores, module, storage and int8 of every one. A new structure adds a row."""

import copy
import json
import math

import pytest
import torch

from market import STRUCTURES
from tensorfold.algebra.solvers.solve import Factors
from tensorfold.algebra.specs.registry import spec_from_dict
from tensorfold.algebra.specs.structure import Structure
from tensorfold.errors import SpecError
from tensorfold.nn import FoldedModule, FoldedTable, linear_class, table_class
from tensorfold.nn.int8 import Int8Folded


@pytest.fixture(params=STRUCTURES, ids=str)
def spec(request):
    return STRUCTURES[request.param]


def leaves_out(spec):
    return spec.kept_sizes != (spec.out_features, spec.in_features)


def modules(spec, dtype=torch.float64):
    """A linear layer or tied head, and a table where the structure can be one; orders are not the identity."""
    torch.manual_seed(0)
    made = [linear_class(spec)(spec, True, dtype=dtype)]
    if not leaves_out(spec):
        made.append(table_class(spec)(spec, 3.0, dtype=dtype))
    for module in made:
        rows, columns = spec.kept_sizes
        orders = torch.randperm(spec.out_features)[:rows], torch.randperm(spec.in_features)[:columns]
        module.load_factors(Factors([core.detach() for core in module.factors()], None, *orders))
    return made


def tokens_of(module, *shape):
    if isinstance(module, FoldedTable):
        return torch.randint(module.spec.out_features, shape)
    return torch.randn(*shape, module.spec.in_features, dtype=module.cores[0].dtype)


def expected(module, x):
    dense = module.to_dense()
    return 3.0 * dense[x] if isinstance(module, FoldedTable) else x @ dense.T + module.bias


def test_it_is_the_protocols(spec):
    assert isinstance(spec, Structure)
    assert spec.parameters == sum(math.prod(shape) for shape in spec.stored_shapes) + spec.scalar_count
    assert 0 < spec.attainable_matrix_rank <= min(spec.out_features, spec.in_features)
    assert spec.macs > 0
    assert spec.row_macs >= 0
    assert hash(spec) == hash(copy.deepcopy(spec))
    assert {"out_modes", "in_modes", "ranks"} == spec.modes_and_ranks().keys()
    assert str(spec)


def test_it_comes_back_from_json(spec):
    assert spec_from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_an_unknown_kind_says_what_to_import():
    with pytest.raises(SpecError, match=r"'wavelet' is not known; import the module that defines it"):
        spec_from_dict({"kind": "wavelet"})


def test_apply_and_rows_are_those_of_the_matrix(spec):
    torch.manual_seed(1)
    cores = spec.complete(
        [torch.randn(shape, dtype=torch.float64) for shape in spec.stored_shapes],
        torch.randn(spec.scalar_count, dtype=torch.float64) if spec.scalar_count else None,
    )
    assert tuple(tuple(core.shape) for core in cores) == tuple(map(tuple, spec.core_shapes))
    dense = spec.dense(cores)
    assert tuple(dense.shape) == spec.kept_sizes
    x = torch.randn(2, 3, spec.kept_sizes[1], dtype=torch.float64)
    torch.testing.assert_close(spec.apply(x, cores), x @ dense.T)
    index = torch.randint(spec.kept_sizes[0], (7,))
    torch.testing.assert_close(spec.rows(index, cores), dense[index])
    if spec.reads_slices:
        torch.testing.assert_close(spec.of_slices([core[index] for core in cores]), dense[index])


def test_a_module_is_its_matrix(spec):
    for module in modules(spec):
        assert isinstance(module, FoldedModule)
        x = tokens_of(module, 2, 3)
        torch.testing.assert_close(module(x), expected(module, x))
        assert tuple(module.to_dense().shape) == (spec.out_features, spec.in_features)


def test_a_tied_head_is_the_tables_matrix(spec):
    if leaves_out(spec):
        return
    table = modules(spec)[1]
    head = table.head(torch.randn(spec.out_features, dtype=torch.float64))
    h = torch.randn(2, 3, spec.in_features, dtype=torch.float64)
    torch.testing.assert_close(head(h), h @ table.to_dense().T + head.bias)
    assert {id(core) for core in head.cores} == {id(core) for core in table.cores}
    torch.testing.assert_close(head.to_dense(), table.to_dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_keeps_the_dtype(spec, dtype):
    for module in modules(spec, dtype):
        x = tokens_of(module, 5)
        y = module(x)
        assert y.dtype == dtype
        reference = copy.deepcopy(module).double()
        close = 60 * torch.finfo(dtype).eps
        wanted = expected(reference, x if isinstance(module, FoldedTable) else x.double())
        torch.testing.assert_close(y.double(), wanted, rtol=close, atol=close * float(wanted.detach().abs().max() + 1))


def test_gradients_reach_every_core(spec):
    for module in modules(spec):
        x = tokens_of(module, 64)
        module(x).square().sum().backward()
        got = [core.grad.clone() for core in module.cores]
        module.zero_grad()
        expected(module, x).square().sum().backward()
        for core, gradient in zip(module.cores, got, strict=True):
            torch.testing.assert_close(gradient, core.grad)


def test_what_is_stored_is_all_there_is(spec):
    for module in modules(spec, torch.float32):
        stored = module.state_dict()
        orders = sum(t.numel() * t.element_size() for t in stored.values() if not t.is_floating_point())
        assert orders == spec.order_bytes
        again = type(module)(spec, device="meta").to_empty(device="cpu")
        again.load_state_dict(stored, strict=False)
        if isinstance(module, FoldedTable):
            again.scale = module.scale
        else:
            again.bias = module.bias
        x = tokens_of(module, 9)
        assert torch.equal(again(x), module(x))


def test_random_cores_have_the_spread_asked_for(spec):
    """Over a few draws, of the rows that are not zero; padding and pivots make it no more than about right."""
    found = []
    for seed in range(8):
        torch.manual_seed(seed)
        layer = linear_class(spec)(spec, False, dtype=torch.float64)
        layer.reset_parameters(0.5)
        dense = layer.to_dense().detach()
        found.append(float(dense[dense.abs().sum(1) > 0].square().mean()))
    assert 0.2 < (sum(found) / len(found)) ** 0.5 < 1.2


def test_int8_is_near(spec):
    for module in modules(spec, torch.float32):
        x = tokens_of(module, 9)
        wanted = module(x).detach()
        with torch.no_grad():
            got = Int8Folded(copy.deepcopy(module))(x)
        assert got.shape == wanted.shape
        assert float((got - wanted).norm() / wanted.norm()) < 0.05


def test_multiply_adds_and_ways(spec):
    for module in modules(spec):
        assert module.macs(1) >= (0 if isinstance(module, FoldedTable) else 1)
        assert isinstance(module.way_taken(4), str)
        x = tokens_of(module, 4)
        for way in module.ways:
            module.way = way
            torch.testing.assert_close(module(x), expected(module, x))
