"""Putting folded modules into a transformers model so that it initialises, ties, saves and loads like any other."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from tensorfold.algebra.solvers.solve import Factors
from tensorfold.algebra.specs.registry import check_size
from tensorfold.algebra.specs.structure import Structure
from tensorfold.errors import InputError
from tensorfold.hf.surgery import mark_initialised, put_experts, split_linear, take_experts_apart
from tensorfold.models.anatomy import Matrix, embedding_scale, expert_tensors, matrices
from tensorfold.models.experts import fused_experts
from tensorfold.nn import StructuredLinear, StructuredTable, linear_class, table_class
from tensorfold.nn.experts import ExpertStack

Folded = StructuredLinear | StructuredTable


def empty_module(matrix: Matrix, spec: Structure) -> Folded:
    """Make a folded module on the meta device, with a bias or scale if the module that it replaces has one.

    Args:
        matrix: Matrix that is replaced.
        spec: Structure of the new module.

    Raises:
        InputError: The structure is for tables, and the matrix is a linear layer's.
    """
    dtype = matrix.parameter.dtype
    if matrix.kind == "embedding":
        return table_class(spec)(spec, scale_of(matrix), device="meta", dtype=dtype)
    if spec.tables_only:
        raise InputError(f"{matrix.name}: {spec} is a table's, and this is a linear layer; needed an MPO's spec.")
    return linear_class(spec)(spec, matrix.bias is not None, device="meta", dtype=dtype)


@torch.no_grad()
def solved_module(matrix: Matrix, spec: Structure, factors: Factors, device: torch.device) -> Folded:
    """Make a folded module that holds a solver's output, with the dtype and bias or scale of the matrix.

    Args:
        matrix: Matrix that is replaced.
        spec: Structure of the new module.
        factors: Cores, scalars and orders.
        device: Where the module is put.
    """
    module = empty_module(matrix, spec).to_empty(device=device)
    module.load_factors(factors)
    if matrix.bias is not None and isinstance(module, StructuredLinear) and module.bias is not None:
        module.bias.copy_(matrix.bias)
    return module


def scale_of(matrix: Matrix) -> float:
    """Constant factor on every row of an embedding.

    Raises:
        InputError: The embedding does more than look up and scale.
    """
    scale = embedding_scale(matrix.module)
    if scale is None:
        raise InputError(
            f"{matrix.name}: {type(matrix.module).__name__} is more than a table lookup; exclude the embedding."
        )
    return scale


def swap(model: PreTrainedModel, matrix: Matrix, module: Folded) -> None:
    """Replace a matrix's module by a folded one, in place; a tied output head becomes a head over its very cores.

    Args:
        model: Model that is changed.
        matrix: Matrix whose module is replaced.
        module: Folded module.
    """
    if isinstance(module, ExpertStack):
        module.turned = getattr(matrix.module, "turned", False)
        put_experts(model, matrix.name, module)
        return
    set_module(model, matrix.name, module)
    if matrix.tied_head is None:
        return
    assert isinstance(module, StructuredTable)  # only tables have tied heads
    old = model.get_submodule(matrix.tied_head)
    set_module(model, matrix.tied_head, module.head(getattr(old, "bias", None)))
    tied = {f"{matrix.tied_head}.{name}": f"{matrix.name}.{name}" for name, _ in module.named_parameters()}
    weight = f"{matrix.tied_head}.weight"
    others = {key: value for key, value in (model._tied_weights_keys or {}).items() if key != weight}
    # transformers searches keys that do not end in "weight" as regular expressions, hence the escapes and the end mark.
    patterns = {re.escape(key) + "$": re.escape(value) + "$" for key, value in tied.items()}
    model._tied_weights_keys = {**others, **patterns}
    expanded = {key: value for key, value in model.all_tied_weights_keys.items() if key != weight}
    model.all_tied_weights_keys = {**expanded, **tied}


def install(
    model: PreTrainedModel, specs: Mapping[str, Structure], tied: Mapping[str, str], split: Mapping[str, list[int]]
) -> None:
    """Replace modules by empty folded ones, as a saved configuration describes them.

    Args:
        model: Model that is changed in place.
        specs: Structure of every folded module, by full name.
        tied: Names of tied output heads, by the name of their folded table.
        split: Sizes of the parts of every linear layer that was split, by full name.

    Raises:
        InputError: The configuration names a module that the model lacks, or gives it another shape.
    """
    available, fused = matrices(model), fused_experts(model)
    for name, sizes in split.items():
        if name in fused:
            if sizes != [fused[name].matrix_shape[0]] * fused[name].experts:
                raise InputError(
                    f"checkpoint: {name} is split into {len(sizes)} experts, but the model's configuration makes it "
                    f"{fused[name].experts}; they do not belong together."
                )
            take_experts_apart(model, name)
            continue
        if name not in available:
            raise InputError(f"checkpoint: its configuration splits {name!r}, which {type(model).__name__} lacks.")
        split_linear(model, name, sizes)
    available = {**matrices(model), **expert_tensors(model)}
    for name, spec in specs.items():
        matrix = available.get(name)
        if matrix is None:
            raise InputError(f"checkpoint: its configuration folds {name!r}, which {type(model).__name__} lacks.")
        if (matrix.out_features, matrix.in_features) != (spec.out_features, spec.in_features):
            raise InputError(
                f"checkpoint: {name} is folded as {spec.out_features}×{spec.in_features}, but the model's "
                f"configuration makes it {matrix.out_features}×{matrix.in_features}; they do not belong together."
            )
        check_size(spec)
        if matrix.tied_head != tied.get(name):
            raise InputError(
                f"checkpoint: {name} is tied to {tied.get(name)!r} in the folded configuration, but to "
                f"{matrix.tied_head!r} by tie_word_embeddings; the two must agree."
            )
        swap(model, matrix, empty_module(matrix, spec))


def set_module(model: PreTrainedModel, name: str, module: nn.Module) -> None:
    """Put a module in the place of another, marked as one that needs no initialisation and must not be divided."""
    model.set_submodule(name, module)
    mark_initialised(model, name)
    # A device map may not part what is computed at once.
    model._no_split_modules = {*(model._no_split_modules or ()), type(module).__name__}
