"""What every module that stands in for a dense weight has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorfold.algebra.solve import Factors
from tensorfold.errors import SpecError
from tensorfold.nn.owners import Cores


class FoldedModule(nn.Module, ABC):
    """Cores in place of a dense weight: how other code recognises a folded module, whatever its structure.

    Attributes:
        cores: The factors, in the order of the sites.
        scalars: One number per bond index, where the structure has them.
    """

    cores: Cores
    scalars: nn.Parameter | None

    @abstractmethod
    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix, shape (out_features, in_features), multiplied out in ``dtype`` (the cores' own if None)."""

    @abstractmethod
    def load_factors(self, factors: Factors) -> None:
        """Copy a solver's output into the parameters."""


def in_table(index: Tensor, size: int) -> Tensor:
    """``index`` itself, integers of shape (n,), once torch has checked, as for nn.Embedding, that all are in [0, size).

    A column of zeros, as long as the table and stored as one, is looked up: that operation has its own check in eager
    mode, in compiled code and in exported graphs, and asks for no value on the way. Others count negative indices from
    the end, some only when compiled.
    """
    return index + F.embedding(index, index.new_zeros(1, 1).expand(size, 1)).squeeze(-1)


def store(parameter: Tensor, values: Tensor) -> None:
    """Copy a solver's numbers into a parameter.

    Raises:
        SpecError: They are too large for its dtype.
    """
    parameter.copy_(values)
    if parameter.dtype is torch.float16 and not bool(parameter.isfinite().all()):
        raise SpecError(
            f"factors with numbers up to {float(values.abs().max()):.1e}, and {parameter.dtype} ends at "
            f"{torch.finfo(parameter.dtype).max:.0f}; load the model in bfloat16 or float32."
        )
