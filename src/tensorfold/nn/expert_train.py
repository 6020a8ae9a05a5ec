"""All experts of a layer as one tensor train."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tensorfold.algebra.specs.expert_train import ExpertTrain
from tensorfold.algebra.specs.structure import Structure
from tensorfold.nn.experts import ExpertStack
from tensorfold.nn.structured import StructuredLinear


class SharedExpertsLinear(ExpertStack, StructuredLinear):
    """Experts ``W_e = U S_e V`` in the place of their tensor; called itself, it gives those of all, (..., E·m)."""

    structure: ClassVar[type[Structure]] = ExpertTrain
    spec: Any

    def __init__(
        self, spec: ExpertTrain, bias: bool = False, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(spec, bias, device, dtype)
        self.turned = False

    @property
    def experts(self) -> int:
        return int(self.spec.experts)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.spec.expert_rows, self.spec.in_features

    def product(self, expert: int, x: Tensor) -> Tensor:
        def compute(x: Tensor) -> Tensor:
            y: Tensor = self.spec.product(expert, x, self.factors())
            return y

        return self.cores(compute, x)

    def matrices(self) -> Tensor:
        dtype = self.cores[0].dtype
        dense = self.to_dense(torch.promote_types(dtype, torch.float32)).to(dtype)
        return dense.unflatten(0, (self.experts, -1))
