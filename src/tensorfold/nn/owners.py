"""Containers of parameters that are called when their numbers are needed, so that hooks on forwards see them.

accelerate brings offloaded weights in before a module's forward and takes them out after it, FSDP and ZeRO-3 gather
shards then, and the replicas of ``DataParallel`` have tensors in place of parameters. None of this reaches a
``ParameterList``, which is never called; so a folded module lets its list call the computation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Cores(nn.ParameterList):
    """Cores of a folded module; ``cores(compute, *inputs)`` is ``compute(*inputs)`` while they are in place."""

    __call__ = nn.Module.__call__  # a ParameterList refuses

    def tensors(self) -> list[Tensor]:
        """Cores as a list, also in a replica, where they are tensors and no parameters."""
        # Ten times as fast as the list's iterator, and empty in a replica.
        return list(self._parameters.values()) or [getattr(self, str(k)) for k in range(len(self))]  # type: ignore[arg-type]

    def forward(self, compute: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Result of ``compute`` for the inputs."""
        return compute(*inputs)


class Codes(nn.ParameterDict):
    """Tensors by name; ``codes(compute, *inputs)`` is ``compute(*inputs)`` while they are in place."""

    __call__ = nn.Module.__call__  # a ParameterDict refuses

    def forward(self, compute: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Result of ``compute`` for the inputs."""
        return compute(*inputs)
