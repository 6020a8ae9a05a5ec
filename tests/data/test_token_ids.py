"""Token ids outside a table: an IndexError from every table, as from nn.Embedding, and never somebody else's row."""

import pytest
import torch
from torch import nn

import tensorfold
from tensorfold import Graded, Kronecker, LowRank, Recipe, Rule, Spec, TokenMPS
from tensorfold.nn import GradedEmbedding, MPOEmbedding, TokenMPSEmbedding
from tensorfold.nn.int8 import Int8Embedding, Int8Folded

ROWS, WIDTH = 53, 24
SPECS = {
    "low-rank": LowRank(rank=8).spec(ROWS, WIDTH),
    "kronecker": Spec.kronecker(54, WIDTH, (6, 4), 3),
    "kronecker-scalars": Spec.kronecker(54, WIDTH, (6, 4), 3, scalars=True),
    "padded": Kronecker(factor=(8, 4), terms=2, pad=True).spec(ROWS, WIDTH),
    "ordered": Kronecker(factor=(8, 4), terms=2, pad=True, order="cluster").spec(ROWS, WIDTH),
    "first-mode-of-one": Spec((1, 54), (4, 6), (4,)),
    "three-sites": Spec.mpo(ROWS, WIDTH, 3, 5),
    "graded": Graded(keep=0.5).spec(ROWS, WIDTH),
    "token-mps": TokenMPS(rank=2, modes=(2, 3, 4)).spec(ROWS, WIDTH),
}


def table(name):
    torch.manual_seed(0)
    spec = SPECS[name]
    kind = {"graded": GradedEmbedding, "token-mps": TokenMPSEmbedding}.get(name, MPOEmbedding)
    return kind(spec, scale=2.0).requires_grad_(False)


def tables():
    for name in SPECS:
        yield name, table(name)
        yield f"{name}-int8", Int8Folded(table(name))
    yield "dense-int8", Int8Embedding.from_dense(torch.randn(ROWS, WIDTH))


TABLES = dict(tables())


def size_of(module):
    return len(module.to_dense())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_ids_outside_the_table_raise(name, dtype):
    module = TABLES[name]
    size = size_of(module)
    dense = module.to_dense() * (1.0 if name == "dense-int8" else 2.0)
    every = torch.arange(size, dtype=dtype).reshape(1, -1)
    torch.testing.assert_close(module(every)[0], dense)
    reference = nn.Embedding.from_pretrained(dense)
    for bad in (size, size + 1, 2 * size, 10**6, -1, -size, -size - 1):
        index = torch.tensor([[0, bad]], dtype=dtype)
        for lookup in (module, reference):
            with pytest.raises(IndexError):
                lookup(index)
    assert module(torch.empty(0, 3, dtype=dtype)).shape == (0, 3, WIDTH)
    assert module(torch.tensor(3, dtype=dtype)).shape == (WIDTH,)


@pytest.mark.parametrize("name", ["padded", "ordered", "graded", "token-mps", "token-mps-int8", "dense-int8"])
def test_compiled_tables_raise_as_well(name):
    """The check of ids reads no value, so a compiled table is one graph."""
    torch._dynamo.reset()
    module, index = TABLES[name], torch.arange(6).reshape(2, 3)
    assert_raises_as_well(torch.compile(module, fullgraph=True, backend="eager", dynamic=True), module, index)


def test_exported_tables_raise_as_well():
    module, index = TABLES["padded"], torch.arange(6).reshape(2, 3)
    length = {1: torch.export.Dim("length")}
    assert_raises_as_well(torch.export.export(module, (index,), dynamic_shapes=(length,)).module(), module, index)


def assert_raises_as_well(lookup, module, index):
    torch.testing.assert_close(lookup(index), module(index))
    for bad in (size_of(module), -1):
        with pytest.raises(IndexError):
            lookup(torch.full((2, 3), bad))


@pytest.mark.parametrize("eight_bits", [False, True], ids=["floating", "int8"])
@pytest.mark.parametrize(
    "method", [LowRank(keep=0.5), Kronecker(keep=0.5, order="cluster"), Graded(keep=0.5), TokenMPS(rank=2)]
)
def test_models_with_a_folded_table_raise(tiny, method, eight_bits):
    model = tiny("llama")
    tensorfold.fold(model, Recipe((Rule("embedding", method),)))
    if eight_bits:
        tensorfold.quantize(model)
    for bad in (300, -1):
        with torch.no_grad(), pytest.raises(IndexError):
            model(torch.tensor([[5, bad]]))
