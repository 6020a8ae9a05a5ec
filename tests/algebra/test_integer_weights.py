"""Weights of whole numbers: the same refusal by every solver, whatever the path that the shape takes."""

import pytest
import torch

from tensorfold import Graded, Kronecker, LowRank, Spec, SpecError, TokenMPS
from tensorfold.algebra.orders.permutation import search_permutations, search_row_order
from tensorfold.algebra.orders.token_order import cluster_order
from tensorfold.algebra.solvers.als import weighted_als
from tensorfold.algebra.solvers.low_rank import error_curve, whitened_low_rank
from tensorfold.algebra.solvers.shared_basis import fit_shared_basis
from tensorfold.algebra.solvers.solve import factorize
from tensorfold.algebra.solvers.starts import pruned, random_cores
from tensorfold.algebra.solvers.ttsvd import tt_svd
from tensorfold.nn import GradedEmbedding, MPOEmbedding, MPOLinear, TokenMPSEmbedding
from tensorfold.nn.int8 import Int8Embedding, Int8Linear

ROWS, COLUMNS = 512, 128
THIN = Spec.kronecker(ROWS, COLUMNS, (256, 128))
SQUARE = Spec.kronecker(ROWS, COLUMNS, (32, 16), 3)
LOW = LowRank(rank=4).spec(ROWS, COLUMNS)
PIVOTED = Spec.low_rank(ROWS, COLUMNS, 4, pivoted=True)
PARTIAL = Spec.low_rank(ROWS, COLUMNS, 4, pivoted=True, rows=400, columns=100)
GROUPS = Spec((ROWS, 1), (4, 32), (3,))
MPO = Spec.mpo(ROWS, COLUMNS, 3, 4)
METRIC = torch.eye(COLUMNS)

SOLVERS = {
    **{
        f"tt-svd {name}": lambda w, spec=spec: tt_svd(w, spec)
        for name, spec in {
            "thin": THIN,
            "square": SQUARE,
            "low-rank": LOW,
            "mpo": Spec.mpo(ROWS, COLUMNS, 3, 4),
        }.items()
    },
    **{
        f"linear {name}": lambda w, spec=spec: MPOLinear.from_dense(w, spec)
        for name, spec in {"thin": THIN, "pivoted": PIVOTED, "partial": PARTIAL, "groups": GROUPS}.items()
    },
    "linear in a metric": lambda w: MPOLinear.from_dense(w, SQUARE, metric=METRIC),
    "embedding": lambda w: MPOEmbedding.from_dense(w, THIN),
    "graded": lambda w: GradedEmbedding.from_dense(w, Graded(keep=0.5).spec(ROWS, COLUMNS)),
    "token-mps": lambda w: TokenMPSEmbedding.from_dense(w, TokenMPS(rank=2, modes=(2,) * 7).spec(ROWS, COLUMNS)),
    "int8 linear": Int8Linear.from_dense,
    "int8 table": Int8Embedding.from_dense,
    "factorize": lambda w: factorize(w, LOW, METRIC),
    "whitened": lambda w: whitened_low_rank(w, METRIC, LOW),
    "error curve": error_curve,
    "als": lambda w: weighted_als(w, SQUARE, tt_svd(w.float(), SQUARE), METRIC),
    "shared basis": lambda w: fit_shared_basis(w, GROUPS, METRIC),
    "orders": lambda w: search_permutations(w[:16, :16], Kronecker(factor=(4, 4)).spec(16, 16)),
    "row order": lambda w: search_row_order([(w[:16, :16], Kronecker(factor=(4, 4)).spec(16, 16))]),
    "cluster": cluster_order,
    "random": lambda w: random_cores(w, SQUARE),
    "pruned": lambda w: pruned(w, Spec.kronecker(ROWS, COLUMNS, (256, 128))),
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("name", SOLVERS)
def test_whole_numbers_are_refused_alike(name, dtype):
    weight = (torch.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) % 7).to(dtype)
    with pytest.raises(SpecError, match=f"of {dtype}; needed floating-point numbers: convert it first"):
        SOLVERS[name](weight)


@pytest.mark.parametrize("name", [name for name in SOLVERS if "int8" not in name and "pruned" not in name])
def test_a_weight_without_numbers_is_refused(name):
    with pytest.raises(SpecError, match="on the meta device; needed floating-point numbers"):
        SOLVERS[name](torch.empty(ROWS, COLUMNS, device="meta"))
