"""The model as it came in: kept on disk while it is trained, and what training changes besides the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from tensorfold.healing.checkpoints import damage, sealed
from tensorfold.healing.trainer import own_tensors

_FILE = "model.safetensors"


class Start:
    """The weights before the first step, in a sealed directory, which the main process writes.

    Raises:
        TensorfoldError: The disk is full.
    """

    def __init__(self, model: PreTrainedModel, directory: Path, state: PartialState) -> None:
        self._directory = directory
        if state.is_main_process and damage(directory) is not None:
            with sealed(directory) as partial:
                save_file(own_tensors(model), partial / _FILE)
        state.wait_for_everyone()

    def give(self, model: PreTrainedModel) -> None:
        """Put them into a model of the same structure."""
        model.load_state_dict(load_file(self._directory / _FILE), strict=False)


@torch.no_grad()
def round_to(model: nn.Module, dtypes: Mapping[int, torch.dtype]) -> bool:
    """Round each parameter to what it will be stored in, by ``id``; whether that is anything else than it is in now."""
    narrower = [p for p in model.parameters() if p.dtype != dtypes[id(p)]]
    for parameter in narrower:
        parameter.copy_(parameter.to(dtypes[id(parameter)]))
    return bool(narrower)


@contextmanager
def as_before(model: PreTrainedModel, restore: bool) -> Iterator[None]:
    """Give back what training changes besides the weights: precision, place, mode, cache, what requires gradients.

    Args:
        restore: False for a model that is sharded meanwhile, of which only the configuration is given back.
    """
    cached = model.config.use_cache
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(each, each.requires_grad, each.device, each.dtype) for each in model.parameters()]
    buffers = [
        (module, name, buffer.device, buffer.dtype)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        model.config.use_cache = cached
        if restore:
            for parameter, required, place, dtype in parameters:
                parameter.grad = None
                parameter.requires_grad_(required)
                parameter.data = parameter.data.to(place, dtype)
            for module, name, place, dtype in buffers:
                setattr(module, name, module.get_buffer(name).to(place, dtype))
            for module, training in modes:
                module.training = training
