"""From an MLP whose left-out hidden units are zeros to one that has fewer: a plain model of smaller sizes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tensorfold.errors import pass_on_memory
from tensorfold.hf.modules import set_module
from tensorfold.models.anatomy import Matrix
from tensorfold.nn import FoldedModule

_NAMES = ("inner", "ffn", "intermediate")  # in those of settings that are None where a width follows from another


class Side(NamedTuple):
    """The hidden units that stay, bool of shape (h,), and whether they are the layer's outputs or its inputs."""

    stays: Tensor
    is_output: bool


@torch.no_grad()
def narrow(model: PreTrainedModel, matrices: Mapping[str, Matrix], sides: Mapping[str, Side]) -> bool:
    """Replace folded layers by plain ones without the units that are gone, in place, and let the configuration say so.

    Args:
        model: Its folded modules are those of ``sides`` and no others.
        matrices: The dense matrices that were folded, by name: of what kind the layers were.
        sides: What stays, by the name of the layer.

    Returns:
        Whether that was possible: all MLPs keep equally many units, and a setting of the configuration is their number.
        Otherwise the model is as it was.
    """
    folded = {name: module for name, module in model.named_modules() if isinstance(module, FoldedModule)}
    sizes = {int(side.stays.sum()) for side in sides.values()}
    wholes = {len(side.stays) for side in sides.values()}
    if not folded or folded.keys() != sides.keys() or len(sizes) != 1 or len(wholes) != 1:
        return False
    size, whole = sizes.pop(), wholes.pop()
    layers = {name: _plain(matrices[name].module, module, sides[name]) for name, module in folded.items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if not _inside(key, layers)}
    shapes |= {
        f"{name}.{key}": tuple(t.shape) for name, layer in layers.items() for key, t in layer.state_dict().items()
    }
    setting = next((name for name in _settings(model, whole) if _describes(model, name, size, shapes)), None)
    if setting is None:
        return False
    for name, layer in layers.items():
        set_module(model, name, layer)
        parent = model.get_submodule(name.rpartition(".")[0])
        for attribute, value in list(vars(parent).items()):
            if value == whole and isinstance(value, int):
                setattr(parent, attribute, size)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            setattr(_text(part.config), setting, size)
    return True


def _plain(old: nn.Module, folded: FoldedModule, side: Side) -> nn.Module:
    """The layer of the old one's class that has only the rows, or columns, of units that stay."""
    stays = side.stays.to(folded.cores[0].device)
    dense, bias = folded.to_dense(), getattr(folded, "bias", None)
    dense = dense[stays] if side.is_output else dense[:, stays]  # (m, n) less rows or columns
    bias = bias[stays] if bias is not None and side.is_output else bias
    rows, columns = dense.shape
    if isinstance(old, Conv1D):
        layer: nn.Module = Conv1D(rows, columns)
        weight = dense.T.contiguous()
    else:
        layer, weight = nn.Linear(columns, rows, bias is not None, device="meta"), dense.contiguous()
    wanted = next(folded.parameters()).requires_grad
    layer.register_parameter("weight", nn.Parameter(weight, wanted))
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone(), wanted))
    return layer.train(folded.training)


def _settings(model: PreTrainedModel, whole: int) -> Iterator[str]:
    """Settings of the configuration that may be the number of hidden units."""
    values: dict[str, Any] = vars(_text(model.config))
    yield from (name for name, value in values.items() if value == whole and isinstance(value, int))
    yield from (name for name, value in values.items() if value is None and any(part in name for part in _NAMES))


def _describes(model: PreTrainedModel, setting: str, size: int, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the configuration with this setting makes a model of these shapes."""
    config = copy.deepcopy(model.config)
    setattr(_text(config), setting, size)
    try:
        with torch.device("meta"):
            made = type(model)(config)
    except Exception as error:  # every architecture fails in its own way
        pass_on_memory(error)
        return False
    return {key: tuple(tensor.shape) for key, tensor in made.state_dict().items()} == dict(shapes)


def _text(config: PreTrainedConfig) -> PreTrainedConfig:
    return config.get_text_config(decoder=True)


def _inside(key: str, layers: Mapping[str, nn.Module]) -> bool:
    return any(key.startswith(f"{name}.") for name in layers)
