"""Surgery on a dense model before it is folded: untie the head, drop layers, split matrices, reorder hidden units.

All but dropping layers leave the model's function as it is.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tensorfold.errors import InputError, pass_on_memory
from tensorfold.models.anatomy import Matrix, blocks, dense_weight, is_plain_linear, matrices
from tensorfold.models.experts import fused_experts
from tensorfold.models.tied_heads import is_promised, tied_head
from tensorfold.nn import StackedLinear
from tensorfold.nn.experts import ExpertLinears

_LAYER_INDEX = re.compile(r"layer_?(idx|id|index|number)$")


@torch.no_grad()
def untie_head(model: PreTrainedModel) -> Matrix | None:
    """Give an output head that is tied to the input table its own copy of the weight, (vocabulary, width), in place.

    An untied model stays as it is: a recipe that asks for this must do for all models of a family, which tie their
    heads at one size and not at another. ``tie_word_embeddings`` also governs lesser ties, such as that of the bias in
    BERT's head; transformers would not make those again on loading, so they go with it.

    Returns:
        The table that was tied, with the head's name as its ``tied_head``; None if there was nothing to untie.
    """
    table = next((matrix for matrix in matrices(model).values() if matrix.tied_head is not None), None)
    if table is None:
        return None
    # A head that was tied by assignment alone is in no list of transformers'.
    for target in {*model.all_tied_weights_keys, f"{table.tied_head}.weight"}:
        shared = model.get_parameter_or_buffer(target)
        own = shared.detach().clone()
        owner, _, attribute = target.rpartition(".")
        value = nn.Parameter(own, shared.requires_grad) if isinstance(shared, nn.Parameter) else own
        setattr(model.get_submodule(owner), attribute, value)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            for config in (module.config, module.config.get_text_config()):
                if getattr(config, "tie_word_embeddings", False):
                    config.tie_word_embeddings = False
            forget_ties(module)
    return table


def forget_ties(model: PreTrainedModel) -> None:
    """Clear transformers' lists of tied weights in a model, whatever its class and configuration say."""
    model._tied_weights_keys, model.all_tied_weights_keys = {}, {}


def without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model to the meta device, sharing weights where the model does, whatever the configuration says.

    On the meta device promised ties count as ties, so a promise that the weights do not keep is not copied.
    """
    empty: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        meta = torch.empty_like(tensor, device="meta")
        empty[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
    twin: PreTrainedModel = copy.deepcopy(model, empty)
    if tied_head(model) is None and is_promised(model):
        for module in twin.modules():
            if isinstance(module, PreTrainedModel):
                forget_ties(module)
    elif tied_head(model) is not None:
        twin.get_output_embeddings().weight = twin.get_input_embeddings().weight
    return twin


def fewer_layers(config: PreTrainedConfig, layers: Sequence[int]) -> PreTrainedConfig:
    """Copy a configuration with only the given layers, in the given order.

    Args:
        config: The model's; in a model of text and images, the text part's layers are meant.
        layers: Indices of the layers that stay.

    Raises:
        InputError: An index is out of range or repeated.
    """
    out = copy.deepcopy(config)
    text = out.get_text_config(decoder=True)
    total = getattr(text, "num_hidden_layers", None)
    if not isinstance(total, int):
        raise InputError(f"layers: {type(text).__name__} has no num_hidden_layers; its layers cannot be dropped.")
    if not layers or len(set(layers)) != len(layers) or not all(0 <= index < total for index in layers):
        raise InputError(f"layers: got {list(layers)}; needed different indices from 0 to {total - 1}.")
    for name, value in list(vars(text).items()):
        # Per-layer settings (Gemma's layer_types, SmolLM3's no_rope_layers) follow their layers.
        per_layer = isinstance(value, list | tuple) and len(value) == total and name != "architectures"
        if per_layer and not name.endswith("token_id"):
            setattr(text, name, type(value)(value[index] for index in layers))
    text.num_hidden_layers = len(layers)
    if hasattr(text, "attention_types"):
        raise InputError(f"layers: {type(text).__name__} gives its layers' kinds in a form that cannot be cut short.")
    return out


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Drop all blocks but the given ones, in place, as DistilGPT2 does (0, 2, 4, 7, 9, 11 of GPT-2's twelve).

    Args:
        model: Dense model.
        layers: Indices of the blocks that stay, in their new order.

    Raises:
        InputError: An index is out of range or repeated, or the model has no list of blocks, or its configuration
            describes another model than the one with these blocks. Nothing is changed then.
    """
    config = fewer_layers(model.config, layers)
    name, chain = blocks(model)
    _check_described(model, config, name, len(chain), layers)
    kept = nn.ModuleList(chain[index] for index in layers)
    for position, block in enumerate(kept):
        for module in block.modules():
            for attribute in [key for key in vars(module) if _LAYER_INDEX.search(key)]:
                setattr(module, attribute, position)
    owners = [model, *(model.get_submodule(name[:end]) for end in range(len(name)) if name[end] == ".")]
    model.set_submodule(name, kept)
    # The model around the text model has the latter's settings in a part of its own, the same object or a copy.
    texts = {id(t): t for each in owners if isinstance(each, PreTrainedModel) for t in [_text_config(each)]}
    for key, value in vars(config.get_text_config(decoder=True)).items():
        for text in texts.values():
            if getattr(text, key, None) != value:
                setattr(text, key, value)


def _text_config(model: PreTrainedModel) -> PreTrainedConfig:
    return model.config.get_text_config(decoder=True)


def _check_described(
    model: PreTrainedModel, config: PreTrainedConfig, name: str, total: int, layers: Sequence[int]
) -> None:
    """Check that a configuration describes the model with only some blocks, by names and shapes of weights.

    Some settings count layers in ways of their own: where cross-attention is, or which layers share keys and values.

    Args:
        model: Model with all blocks.
        config: Configuration with fewer layers.
        name: Name of the list of blocks.
        total: Number of all blocks.
        layers: Indices of the blocks that stay.

    Raises:
        InputError: It does not.
    """
    place = {f"{name}.{old}.": f"{name}.{new}." for new, old in enumerate(layers)}
    wanted = {}
    for key, tensor in model.state_dict().items():
        if not key.startswith(f"{name}."):
            wanted[key] = tensor.shape
            continue
        block = f"{name}.{key.removeprefix(f'{name}.').partition('.')[0]}."
        if block in place:
            wanted[place[block] + key.removeprefix(block)] = tensor.shape
    try:
        with torch.device("meta"):
            found = {key: tensor.shape for key, tensor in type(model)(copy.deepcopy(config)).state_dict().items()}
    # Every architecture fails in its own way.
    except Exception as error:
        pass_on_memory(error)
        raise InputError(
            f"layers: {type(model).__name__} cannot be built with layers {list(layers)} of its {total} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); keep all layers, or others."
        ) from error
    wrong = next((key for key in {**wanted, **found} if wanted.get(key) != found.get(key)), None)
    if wrong is not None:
        raise InputError(
            f"layers: with layers {list(layers)} of its {total}, the configuration of {type(model).__name__} describes "
            f"another {wrong} than the one there is; keep all layers, or others."
        )


def split_linear(model: PreTrainedModel, name: str, parts: int | Sequence[int]) -> list[str]:
    """Replace a fused linear layer by its parts, in place and without changing what it computes.

    Args:
        model: Model that is changed.
        name: Full name of the layer.
        parts: Number of equal parts of its outputs, or their sizes.

    Returns:
        Names of the parts: ``NAME.0``, ``NAME.1``, …

    Raises:
        InputError: The layer is no plain linear layer, or the parts do not add up to its outputs.
    """
    module = model.get_submodule(name)
    if not is_plain_linear(module):
        raise InputError(f"split: {name} is a {type(module).__name__}; needed a plain linear layer.")
    weight, bias = dense_weight(module), getattr(module, "bias", None)
    rows = weight.shape[0]
    sizes = [rows // parts] * parts if isinstance(parts, int) else list(parts)
    if sum(sizes) != rows or min(sizes) < 1:
        raise InputError(f"split: {name} has {rows} outputs; {parts} does not divide them into parts.")
    stacked = StackedLinear()
    for start, size in zip(itertools.accumulate([0, *sizes[:-1]]), sizes, strict=True):
        part = nn.Linear(weight.shape[1], size, bias is not None, device="meta")
        part.weight = nn.Parameter(weight[start : start + size].detach().clone())
        if bias is not None:
            part.bias = nn.Parameter(bias[start : start + size].detach().clone())
        part._is_hf_initialized = True  # type: ignore[assignment]
        stacked.append(part)
    stacked.train(module.training)
    model.set_submodule(name, stacked)
    mark_initialised(model, name)
    return [f"{name}.{index}" for index in range(len(sizes))]


def mark_initialised(model: PreTrainedModel, name: str) -> None:
    """Mark a module that was put in the place of another, so that transformers does not initialise it.

    Neither do parents whose initialiser reaches into their children by name (GPT-2's) and would look for the dense
    weight. All other parents are left to it: it fills the buffers that no checkpoint holds, such as position indices.
    """
    module, above = model.get_submodule(name), name.rpartition(".")[0]
    module._is_hf_initialized = True  # type: ignore[assignment]
    parent = model.get_submodule(above)
    if any(tensor.is_meta for tensor in itertools.chain(module.parameters(), module.buffers())):
        paths = [".".join(above.split(".")[:end]) for end in range(above.count(".") + 1, -1, -1)]
        owners = [owner for path in paths if isinstance(owner := model.get_submodule(path), PreTrainedModel)]
        try:
            owners[0]._init_weights(parent)
        except AttributeError:
            parent._is_hf_initialized = True  # type: ignore[assignment]


@torch.no_grad()
def take_experts_apart(model: PreTrainedModel, name: str) -> None:
    """Replace a tensor with the matrices of all experts by a linear layer for each; the model's function stays.

    The layers are called ``NAME.0``, ``NAME.1``, …; biases and the router stay what they are.

    Args:
        model: Model that is changed in place.
        name: Full name of the tensor, one of :func:`tensorfold.models.experts.fused_experts`.
    """
    fused = fused_experts(model)[name]
    rows, columns = fused.matrix_shape
    layers = []
    for expert in range(fused.experts):
        layer = nn.Linear(columns, rows, bias=False, device="meta")
        layer.weight = nn.Parameter(fused.weight(expert).clone(memory_format=torch.contiguous_format))
        layer.requires_grad_(fused.tensor.requires_grad)
        layer._is_hf_initialized = True  # type: ignore[assignment]
        layers.append(layer)
    del fused.owner._parameters[fused.attribute]
    put_experts(model, name, ExpertLinears(layers, fused.turned))


def put_experts(model: PreTrainedModel, name: str, stack: nn.Module) -> None:
    """Put a stack of experts in the place of the tensor that it stands for, or of another stack.

    Args:
        model: Model that is changed in place.
        name: Full name of the tensor.
        stack: An ``ExpertStack``.
    """
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    stack.train(module.training)
    module._modules[attribute] = stack
    mark_initialised(model, name)
    model._no_split_modules = {*(model._no_split_modules or ()), type(stack).__name__}  # computed at once


@dataclass(frozen=True)
class HiddenUnits:
    """Matrices that meet in one MLP's hidden layer.

    Attributes:
        ups: One or two matrices (hidden, width) whose rows are the hidden units, a gate among them.
        down: Matrix (width, hidden) whose columns are these units.
    """

    ups: list[Matrix]
    down: Matrix


def hidden_units(model: PreTrainedModel, available: Mapping[str, Matrix]) -> list[HiddenUnits]:
    """Hidden layers of MLPs whose units can be reordered: one contracting matrix and the expanding ones beside it.

    An MLP with anything else as wide as its hidden layer, such as BitNet's norm, is left out: it would have to follow.

    Args:
        model: The model.
        available: Foldable matrices by name.
    """
    families: dict[str, list[Matrix]] = {}
    for matrix in available.values():
        if matrix.group == "mlp":
            families.setdefault(matrix.name.rpartition(".")[0], []).append(matrix)
    found = []
    for parent, members in families.items():
        downs = [m for m in members if m.out_features < m.in_features]
        if len(downs) != 1:
            continue
        down = downs[0]
        shape = (down.in_features, down.out_features)
        ups = [m for m in members if (m.out_features, m.in_features) == shape]
        own = {id(m.parameter) for m in members} | {id(m.bias) for m in ups if m.bias is not None}
        beside = model.get_submodule(parent).parameters()
        others = [p for p in beside if id(p) not in own and down.in_features in p.shape]
        if 1 <= len(ups) <= 2 and len(ups) + 1 == len(members) and not others:
            found.append(HiddenUnits(ups, down))
    return found


@torch.no_grad()
def reorder_hidden(units: HiddenUnits, order: Tensor) -> None:
    """Reorder an MLP's hidden units in place: rows and biases of the expanding matrices, columns of the other.

    Elementwise activations and gates commute with it, so the MLP computes what it did (TQCompressor, arXiv 2401.16367).

    Args:
        units: The MLP's matrices.
        order: Old index of the unit at each place, int64, (hidden,).
    """
    for matrix in units.ups:
        weight = dense_weight(matrix.module)
        weight.copy_(weight[order])
        if matrix.bias is not None:
            matrix.bias.copy_(matrix.bias[order])
    weight = dense_weight(units.down.module)
    weight.copy_(weight[:, order])
