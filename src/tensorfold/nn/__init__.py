"""Modules whose weight is a chain of small tensors."""

from tensorfold.nn.embedding import MPOEmbedding
from tensorfold.nn.folded import FoldedModule
from tensorfold.nn.graded import GradedEmbedding, GradedHead
from tensorfold.nn.linear import MPOLinear, MPOModule
from tensorfold.nn.machine import calibrate_machine
from tensorfold.nn.matrices import cache_matrices
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
