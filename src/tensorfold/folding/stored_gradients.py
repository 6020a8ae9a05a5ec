"""Gradient moments of the layers that share a budget, kept on the disk until their layer is folded."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tensorfold.calibration.block_stream import BlockStream
from tensorfold.calibration.gradient_walk import walk_gradient_moments
from tensorfold.calibration.gradients import gradient_moments
from tensorfold.calibration.packed_symmetric import Packed, numbers
from tensorfold.errors import pass_on_memory
from tensorfold.models.anatomy import Matrix
from tensorfold.models.residency import Residency
from tensorfold.utils.block_checkpoints import BlockCheckpoints
from tensorfold.utils.memory import release_heap

_BLOCK = 0  # of a checkpoint


@dataclass(frozen=True, eq=False)
class StoredGradients:
    """Gradient moments by the name of the layer; together they are as large as half the model.

    Attributes:
        moments: On the disk where the model is on the CPU or there is a checkpoint, else in the accelerator's memory.
        folder: Temporary directory of their files, removed with this object; None where a checkpoint holds them.
    """

    moments: dict[str, Packed]
    folder: tempfile.TemporaryDirectory[str] | None = None


def take_gradients(
    model: PreTrainedModel,
    windows: Tensor,
    prefix: int,
    layers: Mapping[str, Matrix],
    store: BlockCheckpoints | None,
    residency: Residency,
) -> StoredGradients:
    """The gradient moments of ``layers`` on the windows, from the checkpoint if it has them.

    Args:
        windows: Token ids, shape (windows, length).
        prefix: How many tokens at the beginning of every window are the tokenizer's.
        residency: Which of the weights are in memory: of one block, the moments are taken block by block.
    """
    names = {name: f"{k:04d}" for k, name in enumerate(layers)}
    stored = store.load(_BLOCK) if store else None
    if store and stored is not None:
        kept, place = stored[1], store.folder("gradients")
        sizes = {name: (layers[name].out_features, layers[name].parameter.device) for name in kept}
        return StoredGradients({name: Packed(*sizes[name], path=place / file) for name, file in kept.items()})
    # Names the block whose activations are not finite, which gradients cannot.
    BlockStream(model, windows, residency.activations)
    folder = None if store else tempfile.TemporaryDirectory()
    place = store.folder("gradients") if store else Path(folder.name if folder else "")
    found: dict[str, Packed] = {}

    def keep(new: Mapping[str, Packed]) -> None:
        for name, packed in new.items():
            if store or packed.values.device.type == "cpu":
                packed.spill(place / names[name])
            found[name] = packed

    for part in [list(layers)] if residency.is_partial else _passes(model, layers):  # each on the disk before the next
        _moments(model, windows, {name: layers[name].module for name in part}, prefix, residency, keep)
        release_heap()
    found = {name: found[name] for name in layers if name in found}
    if store:
        kept = {name: names[name] for name in found}
        store.save(_BLOCK, {}, kept, [place / file for file in kept.values()])
    return StoredGradients(found, folder)


def _moments(
    model: PreTrainedModel,
    windows: Tensor,
    modules: Mapping[str, nn.Module],
    prefix: int,
    residency: Residency,
    keep: Callable[[dict[str, Packed]], None],
) -> None:
    """Moments by a rounded pass; by an exact one for models whose code bears no dtypes that autocast has changed."""

    def take(rounded: bool) -> None:
        if residency.activations is None:
            keep(gradient_moments(model, windows, modules, prefix, rounded, drawn=True))
        else:
            walk_gradient_moments(model, windows, modules, prefix, rounded, residency.activations, keep)

    try:
        take(rounded=True)
    except RuntimeError as error:
        pass_on_memory(error)
        take(rounded=False)


def _passes(model: PreTrainedModel, layers: Mapping[str, Matrix]) -> list[list[str]]:
    """Names of the layers whose moments are taken in one pass over the text: all, or halves of them.

    Halves where the moments would outweigh the model, as those of expanding matrices do.
    """
    order = list(layers)
    moments = sum(numbers(layer.out_features) * torch.float32.itemsize for layer in layers.values())
    model_bytes = sum(parameter.nbytes for parameter in model.parameters())
    if moments <= model_bytes:
        return [order]
    return [order[len(order) // 2 :], order[: len(order) // 2]]
