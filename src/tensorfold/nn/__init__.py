"""Modules whose weight is a matrix product operator."""

from tensorfold.nn.embedding import MPOEmbedding
from tensorfold.nn.linear import MPOLinear

__all__ = ["MPOEmbedding", "MPOLinear"]
