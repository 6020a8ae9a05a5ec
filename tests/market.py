"""One market of structures, and every path through each; module tests of all folders go through it."""

import importlib.util
from pathlib import Path

from tensorfold.algebra.contraction.costs import Machine, default_machine
from tensorfold.algebra.contraction.paths import Order
from tensorfold.algebra.contraction.search import fastest_path
from tensorfold.algebra.specs.expert_train import ExpertTrain
from tensorfold.algebra.specs.graded import GradedSpec
from tensorfold.algebra.specs.spec import Spec
from tensorfold.algebra.specs.token_mps import TokenMPSSpec
from tensorfold.methods import MPO, Kronecker, LowRank


def example(name):
    """A module of ``examples/``."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


own_structure = example("own_structure")

# name -> spec; names are the methods', shapes cover expanding, contracting, square, prime and degenerate matrices.
MARKET = {
    "kronecker-1": Kronecker(factor=(12, 8)).spec(48, 16),
    "kronecker-mirrored": Kronecker(factor=(12, 8)).spec(16, 48),
    "kronecker-3": Kronecker(factor=(8, 4), terms=3).spec(32, 24),
    "kronecker-scalars": Kronecker(factor=(6, 4), terms=4, scalars=True).spec(24, 20),
    "kronecker-keep": Kronecker(keep=0.5).spec(32, 48),
    "kronecker-padded": Kronecker(factor=(8, 4), terms=2, pad=True).spec(53, 18),
    "kronecker-ordered": Kronecker(factor=(12, 8), terms=2, order="cluster").spec(48, 16),
    "low-rank": LowRank(rank=5).spec(31, 17),
    "low-rank-full": LowRank(rank=16).spec(40, 16),
    "low-rank-keep": LowRank(keep=0.6).spec(24, 36),
    "mpo-1": MPO(bond=1, sites=1).spec(7, 5),
    "mpo-2": MPO(bond=6, sites=2).spec(16, 24),
    "mpo-3": MPO(bond=9, sites=3).spec(64, 27),
    "mpo-4-keep": MPO(keep=0.9, sites=4).spec(36, 48),
    "mpo-prime": MPO(bond=7, sites=2).spec(53, 31),
    "mpo-ordered": MPO(bond=7, sites=3, order="frequency").spec(53, 31),
    "mpo-modes": MPO(bond=8, out_modes=(5, 13), in_modes=(8, 16)).spec(65, 128),
    "mpo-rank-full": Spec.from_modes((4, 6), (3, 5), 12),
    "small-factor-first": Spec((3, 16), (1, 16), (1,)),
    "turned-factor": Spec((4, 8), (16, 1), (4,)),
    "reordered": Spec.kronecker(24, 20, (6, 4), 2, reordered=("out", "in")),
}

# Every structure; one of one's own adds a row, and goes through the same tests.
STRUCTURES = {
    **MARKET,
    "expert-train": ExpertTrain(3, 8, 12, 5, 7),
    "expert-train-inputs": ExpertTrain(3, 8, 12, 8, 7),
    "expert-train-outputs": ExpertTrain(3, 8, 12, 5, 12),
    "pivoted": Spec.low_rank(31, 17, 5, pivoted=True),
    "pivoted-partial": Spec.low_rank(31, 17, 5, pivoted=True, rows=20, columns=12),
    "partial": Spec.partial(31, 17, rows=20, columns=12),
    "grouped": Spec((24, 1), (3, 8), (5,), reordered=("in",), pivoted=True),
    "grouped-rows": Spec((3, 8), (24, 1), (5,), reordered=("out",), pivoted=True),
    "graded": GradedSpec(40, 12, ((4, 12), (12, 7), (24, 3))),
    "graded-inexact": GradedSpec(40, 12, ((16, 7), (24, 3))),
    "token-mps": TokenMPSSpec(40, 12, (2, 2, 3), 2),
    "token-mps-padded": TokenMPSSpec(40, 11, (2, 2, 3), 2),
    "block-diagonal": own_structure.BlockDiagonal(24, 32, 4),
}

# Machines on which little but one thing matters, so that between them every kind of step is somewhere the best.
MACHINES = {
    "processor": Machine(),
    "accelerator": default_machine("cuda"),
    "no-copies": Machine(permuted=1.0),
    "few-calls": Machine(call=1.0),
    "no-batches": Machine(rows=1e6, columns=1e6, permuted=1e12),
    "free-batches": Machine(rows=0.0, columns=0.0, depth=0.0, call=0.0),
}


def orders(sites):
    """Every order of contracting that many sites one at a time."""
    for start in range(sites):
        for pattern in range(2 ** (sites - 1)):
            moves = "".join("LR"[pattern >> k & 1] for k in range(sites - 1))
            if moves.count("L") == start:
                yield Order(start, moves, 0)


def paths_of(spec):
    forced = [None, "materialise", *orders(spec.sites)]
    return {
        (path.steps, path.permutation): path
        for machine in MACHINES.values()
        for tokens in (1, 7, 600)
        for training in (False, True)
        for force in forced
        for path in [fastest_path(spec, tokens, training, machine, force)]
    }.values()
