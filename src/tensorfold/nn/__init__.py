"""Modules whose weight is a chain of small tensors."""

from tensorfold.nn.base import FoldedModule
from tensorfold.nn.cached_matrices import cache_matrices
from tensorfold.nn.embedding import MPOEmbedding
from tensorfold.nn.graded import GradedEmbedding, GradedHead
from tensorfold.nn.linear import MPOLinear, MPOModule
from tensorfold.nn.machine_speeds import calibrate_machine
from tensorfold.nn.stacked import StackedLinear
from tensorfold.nn.token_mps import TokenMPSEmbedding, TokenMPSHead

FoldedModule.register(MPOModule)

__all__ = [
    "FoldedModule",
    "GradedEmbedding",
    "GradedHead",
    "MPOEmbedding",
    "MPOLinear",
    "MPOModule",
    "StackedLinear",
    "TokenMPSEmbedding",
    "TokenMPSHead",
    "cache_matrices",
    "calibrate_machine",
]
