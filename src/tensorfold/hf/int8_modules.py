"""Replacement of a transformers model's modules by int8 ones."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from tensorfold.errors import InputError
from tensorfold.hf.modules import set_module
from tensorfold.models.anatomy import dense_weight, embedding_scale, is_plain_linear
from tensorfold.models.tied_heads import tied_head
from tensorfold.nn import FoldedModule
from tensorfold.nn.experts import ExpertStack
from tensorfold.nn.int8 import Int8Embedding, Int8Folded, Int8Linear

Int8 = Int8Linear | Int8Embedding | Int8Folded


@torch.no_grad()
def install_int8(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Replace modules by int8 ones with their values, or by empty ones where the model is on the meta device.

    Args:
        model: Model that is changed in place.
        names: Full names of the modules; a head that is tied to one of them follows it.

    Raises:
        InputError: The model has no such module, or it is of a kind that cannot be in int8.
    """
    table_name, head_name = _tie(model)
    for name in names:
        try:
            old = model.get_submodule(name)
        except AttributeError:
            raise InputError(f"checkpoint: its configuration has {name!r} in int8, which the model lacks.") from None
        new = _int8(name, old)
        set_module(model, name, new)
        if name == table_name and head_name is not None:
            _tie_head(model, name, new, head_name)


def int8_targets(model: PreTrainedModel) -> list[str]:
    """Names of modules that can be in int8, without the head of a tied table, which follows the table."""
    _, head = _tie(model)
    inside: tuple[str, ...] = ()
    found = []
    for name, module in model.named_modules():
        if name == head or name.startswith(inside or "\0") or isinstance(module, ExpertStack):  # its own layers can
            continue
        if isinstance(module, FoldedModule):
            inside = (*inside, f"{name}.")
        if isinstance(module, FoldedModule) or _is_dense(module):
            found.append(name)
    return found


def _is_dense(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer, or a table that at most scales its rows."""
    if isinstance(module, nn.Embedding):
        return embedding_scale(module) is not None
    return is_plain_linear(module)


def _int8(name: str, module: nn.Module) -> Int8:
    if isinstance(module, FoldedModule):
        return Int8Folded(module)
    if isinstance(module, nn.Embedding) and _is_dense(module):
        return Int8Embedding.from_dense(module.weight, embedding_scale(module) or 1.0)
    if is_plain_linear(module):
        bias = getattr(module, "bias", None)
        return Int8Linear.from_dense(dense_weight(module), bias)
    raise InputError(f"checkpoint: its configuration has {name!r} in int8, which is a {type(module).__name__}.")


def _tie(model: PreTrainedModel) -> tuple[str | None, str | None]:
    """Names of the input table and of the output head that shares its weights; None for a head that does not."""
    names = {id(module): name for name, module in model.named_modules()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    table_name, head_name = names.get(id(table)), names.get(id(head))
    if head is None or head_name is None:
        return table_name, None
    shared = {id(p) for p in table.parameters()} & {id(p) for p in head.parameters()}
    return table_name, head_name if shared or tied_head(model) is not None else None


def _tie_head(model: PreTrainedModel, table_name: str, table: Int8, head_name: str) -> None:
    """Replace a tied head by one that uses the table's own codes, and tie it to them for saving and loading."""
    old = model.get_submodule(head_name)
    if isinstance(table, Int8Embedding):
        head: Int8 = table.head(getattr(old, "bias", None))
    else:
        assert isinstance(old, FoldedModule)
        assert isinstance(table, Int8Folded)
        head = Int8Folded(old, table)
    set_module(model, head_name, head)
    shared = {id(parameter): name for name, parameter in table.named_parameters()}
    tied = {
        f"{head_name}.{name}": f"{table_name}.{shared[id(parameter)]}"
        for name, parameter in head.named_parameters()
        if id(parameter) in shared
    }
    own = f"{head_name}."
    others = {
        key: value
        for key, value in (model._tied_weights_keys or {}).items()
        if not key.replace("\\", "").startswith(own) or key.replace("\\", "") == f"{own}bias"
    }
    patterns = {re.escape(key) + "$": re.escape(value) + "$" for key, value in tied.items()}
    model._tied_weights_keys = {**others, **patterns}
    expanded = {k: v for k, v in model.all_tied_weights_keys.items() if not k.startswith(own) or k == f"{own}bias"}
    model.all_tied_weights_keys = {**expanded, **tied}
