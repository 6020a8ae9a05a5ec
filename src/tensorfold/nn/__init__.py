"""Modules that hold a structured matrix as small tensors, its cores, in place of a dense weight."""

from tensorfold.nn.base import FoldedModule, FoldedTable
from tensorfold.nn.cached_matrices import cache_matrices
from tensorfold.nn.embedding import MPOEmbedding
from tensorfold.nn.expert_train import SharedExpertsLinear
from tensorfold.nn.graded import GradedEmbedding, GradedHead
from tensorfold.nn.linear import MPOLinear
from tensorfold.nn.machine_speeds import calibrate_machine
from tensorfold.nn.stacked import StackedLinear
from tensorfold.nn.structured import StructuredLinear, StructuredTable, linear_class, table_class
from tensorfold.nn.token_mps import TokenMPSEmbedding, TokenMPSHead

__all__ = [
    "FoldedModule",
    "FoldedTable",
    "GradedEmbedding",
    "GradedHead",
    "MPOEmbedding",
    "MPOLinear",
    "SharedExpertsLinear",
    "StackedLinear",
    "StructuredLinear",
    "StructuredTable",
    "TokenMPSEmbedding",
    "TokenMPSHead",
    "cache_matrices",
    "calibrate_machine",
    "linear_class",
    "table_class",
]
