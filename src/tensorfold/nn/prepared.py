"""What a layer keeps from one call to the next, so that few vectors cost no more than their products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Function = Callable[[Tensor], Tensor]


class Prepared:
    """Functions of a layer's inputs with the tensors that they were made of, for as long as these are in place.

    They serve forwards without gradients and without autocast on a processor. Values that are changed in place are
    seen, since the functions work on views; parameters that are replaced, by loading, moving or ``.data``, and orders
    that are changed in any way are noticed.

    Args:
        like: Inputs, (..., in), of the number of axes that single vectors will have.
        sources: Modules, and names of their parameters and buffers, that the functions are made of.
        cores: Module whose forward hooks must be called; with hooks no function is used.
        one: From a single vector to outputs, both with all axes; None where there is nothing to prepare.
        many: From any number of vectors to outputs, likewise.
    """

    __slots__ = ("cores", "dtype", "many", "one", "shape", "sources")

    def __init__(
        self,
        like: Tensor,
        sources: Sequence[tuple[nn.Module, str]],
        cores: nn.Module,
        one: Function | None,
        many: Function | None,
    ) -> None:
        self.shape = torch.Size([1] * (like.dim() - 1) + [like.shape[-1]])
        self.dtype, self.cores, self.one, self.many = like.dtype, cores, one, many
        self.sources: list[tuple[dict[str, Any], str, Any, int, int]] = []
        for module, name in sources:
            is_order = name in module._buffers
            owner: dict[str, Any] = module._buffers if is_order else module._parameters
            tensor = owner.get(name)
            address = 0 if tensor is None else tensor.data_ptr()
            version = tensor._version if tensor is not None and is_order else -1
            self.sources.append((owner, name, tensor, address, version))

    def function_for(self, x: Tensor) -> Function | None:
        """Function that serves this call; None if there is none."""
        function = self.one if x.shape == self.shape else self.many
        if function is None or x.dtype is not self.dtype or not x.is_cpu or torch.is_grad_enabled():
            return None
        own = self.cores.__dict__
        if own["_forward_pre_hooks"] or own["_forward_hooks"] or "forward" in own or not self.is_current():
            return None
        return None if torch.is_autocast_enabled("cpu") else function

    def is_current(self) -> bool:
        """Whether the tensors that the functions were made of are still the layer's."""
        for owner, name, tensor, address, version in self.sources:
            if owner.get(name) is not tensor or (tensor is not None and tensor.data_ptr() != address):
                return False
            if tensor is not None and version >= 0 and tensor._version != version:
                return False
        return True
