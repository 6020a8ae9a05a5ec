"""Methods: each makes a spec for a matrix's shape and a budget, and says which solver fills it."""

from tensorfold.methods.base import METHODS, Method
from tensorfold.methods.experts import SharedExperts
from tensorfold.methods.kronecker import Kronecker
from tensorfold.methods.low_rank import LowRank
from tensorfold.methods.mpo import MPO
from tensorfold.methods.tables import Graded, TokenMPS

__all__ = ["METHODS", "MPO", "Graded", "Kronecker", "LowRank", "Method", "SharedExperts", "TokenMPS"]
