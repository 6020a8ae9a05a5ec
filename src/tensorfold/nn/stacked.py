"""A linear layer whose rows are split among several layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StackedLinear(nn.ModuleList):
    """``y = [W_0; W_1; …] x``: a fused matrix, such as GPT-2's ``c_attn``, as parts that can be folded one by one."""

    def forward(self, input: Tensor) -> Tensor:
        """Shape ``(..., in_features)`` → ``(..., sum of the parts' out_features)``."""
        return torch.cat([part(input) for part in self], dim=-1)
