"""Modules whose weight is a matrix product operator."""

from tensorfold.nn.embedding import MPOEmbedding
from tensorfold.nn.linear import MPOLinear, MPOModule
from tensorfold.nn.stacked import StackedLinear

__all__ = ["MPOEmbedding", "MPOLinear", "MPOModule", "StackedLinear"]
