"""The state of a model before healing: its weights, kept on disk, and everything else that training changes."""

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
    """The weights of a model before healing, kept in a directory with checksums.

    The main process writes the directory, unless an intact one is there from a run that was killed.

    Args:
        model: The model to be healed.
        directory: Directory for its weights.
        state: The processes of the run.

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
        """Load the weights into a model of the same structure."""
        model.load_state_dict(load_file(self._directory / _FILE), strict=False)


@torch.no_grad()
def round_to(model: nn.Module, dtypes: Mapping[int, torch.dtype]) -> bool:
    """Round each parameter to the dtype that it will be stored in, leaving it in the dtype that it has.

    Args:
        model: The model, changed in place.
        dtypes: Dtype to round to, by the ``id`` of the parameter.

    Returns:
        Whether any parameter has another dtype now than it will be stored in.
    """
    narrower = [p for p in model.parameters() if p.dtype != dtypes[id(p)]]
    for parameter in narrower:
        parameter.copy_(parameter.to(dtypes[id(parameter)]))
    return bool(narrower)


@contextmanager
def as_before(model: PreTrainedModel, restore: bool) -> Iterator[None]:
    """Restore, at the end of the ``with`` block, what training changes beside the values of weights.

    That is dtype and device of parameters and buffers, which of them require gradients, the mode of every module, and
    ``use_cache`` of the configuration.

    Args:
        restore: Whether to restore more than the configuration; not possible for a model that is sharded meanwhile.
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
