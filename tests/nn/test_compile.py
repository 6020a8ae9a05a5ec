"""Every module of ours under ``torch.compile(fullgraph=True)``: one graph, and the numbers of eager mode."""

import copy

import pytest
import torch
from torch import nn

import tensorfold
from tensorfold import Graded, Kronecker, LowRank, Recipe, Rule, Spec, TokenMPS
from tensorfold.nn import GradedEmbedding, MPOEmbedding, MPOLinear, StackedLinear, TokenMPSEmbedding
from tensorfold.nn.int8 import Int8Embedding, Int8Folded, Int8Linear

OUT, IN = 24, 16
LAYERS = {
    "low-rank": LowRank(rank=5).spec(OUT, IN),
    "pivots": Spec.low_rank(OUT, IN, 5, pivoted=True),
    "pivots-of-some-columns": Spec.low_rank(OUT, IN, 5, pivoted=True, rows=20, columns=12),
    "pivots-of-groups": Spec((OUT, 1), (4, 4), (2,), reordered=("in",), pivoted=True),
    "groups-of-rows": Spec((4, 6), (IN, 1), (3,)),
    "kronecker": Spec.kronecker(OUT, IN, (6, 4), 3, scalars=True),
    "orders": Spec.kronecker(OUT, IN, (6, 4), 3, reordered=("out", "in")),
    "partial": Spec.partial(OUT, IN, rows=20, columns=12),
    "three-sites": Spec.mpo(OUT, IN, 3, 6),
}
TABLES = {
    "low-rank": (MPOEmbedding, LowRank(rank=5).spec(OUT, IN)),
    "ordered": (MPOEmbedding, Kronecker(factor=(6, 4), terms=2, order="cluster").spec(OUT, IN)),
    "graded": (GradedEmbedding, Graded(keep=0.6).spec(OUT, IN)),
    "graded-exact": (GradedEmbedding, Graded(keep=0.9).spec(100, IN)),
    "token-mps": (TokenMPSEmbedding, TokenMPS(rank=2, modes=(4, 4)).spec(OUT, IN)),
}


def modules():
    for name, spec in LAYERS.items():
        yield name, MPOLinear(spec, bias=True)
        yield f"{name}-int8", Int8Folded(MPOLinear(spec, bias=True))
    for name, (kind, spec) in TABLES.items():
        table = kind(spec, scale=2.0)
        yield f"{name}-table", table
        yield f"{name}-head", table.head(torch.zeros(spec.out_features))
        yield f"{name}-table-int8", Int8Folded(table)
        yield f"{name}-head-int8", Int8Folded(table.head())
    yield "dense-table-int8", Int8Embedding.from_dense(torch.randn(OUT, IN))
    yield "dense-int8", Int8Linear.from_dense(torch.randn(OUT, IN), torch.zeros(OUT))
    yield "stacked", StackedLinear([MPOLinear(LAYERS["low-rank"]), nn.Linear(IN, 3)])


torch.manual_seed(0)
MODULES = dict(modules())


def compiled(module):
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend="eager")


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_one_graph(name):
    module = MODULES[name].eval()
    inputs = torch.arange(OUT).reshape(3, -1) if "table" in name else torch.randn(3, 8, IN)
    with torch.no_grad():
        torch.testing.assert_close(compiled(module)(inputs), module(inputs))


@pytest.mark.parametrize("name", ["low-rank", "pivots", "kronecker", "graded-head", "token-mps-head", "ordered-table"])
@pytest.mark.parametrize("mode", ["float16", "autocast", "training"])
def test_so_it_is_in_other_dtypes_and_in_training(name, mode):
    module = MODULES[name]
    inputs = torch.arange(OUT) if "table" in name else torch.randn(8, IN)
    if mode == "training":
        torch.testing.assert_close(compiled(module)(inputs), module(inputs))
    elif mode == "autocast":
        with torch.no_grad(), torch.autocast("cpu", torch.float16):
            torch.testing.assert_close(compiled(module)(inputs), module(inputs), rtol=1e-2, atol=1e-2)
    else:
        inputs = inputs if "table" in name else inputs.half()
        half = copy.deepcopy(module).half()
        with torch.no_grad():
            torch.testing.assert_close(compiled(half)(inputs), half(inputs), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("table", "eight_bits"),
    [(Graded(keep=0.5), False), (Kronecker(keep=0.5, order="cluster"), True), (TokenMPS(rank=2), True)],
    ids=["graded", "ordered-int8", "token-mps-int8"],
)
def test_a_model_is_one_graph(tiny, table, eight_bits):
    model, ids = tiny("llama"), torch.arange(24).reshape(2, 12)
    tensorfold.fold(model, Recipe((Rule("embedding", table), Rule("mlp", LowRank(keep=0.5, pivots=True)))))
    if eight_bits:
        tensorfold.quantize(model)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
