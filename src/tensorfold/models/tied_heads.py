"""The tie of output head and input table: what the weights are, what is promised, what the configuration says."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel


def tied_head(model: PreTrainedModel) -> str | None:
    """Name of the output head, where it is one weight with the input table.

    Weights are asked where there are any: one tensor, or, where the configuration promises a tie, two of equal values.
    On the meta device the promise counts.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or table is None:
        return None
    name = next((name for name, module in model.named_modules() if module is head), None)
    own, shared = getattr(head, "weight", None), getattr(table, "weight", None)
    if not isinstance(own, Tensor) or not isinstance(shared, Tensor):
        return None
    if own is shared or (is_promised(model) and (own.is_meta or torch.equal(own, shared))):
        return name
    return None


def is_promised(model: PreTrainedModel) -> bool:
    """Whether the configuration says that output head and input table are one weight, or transformers has them as one.

    Where a checkpoint has a head of other values, transformers parts the two and leaves the configuration as it is.
    """
    return is_said(model) or _is_tie_of_head(model, getattr(model, "all_tied_weights_keys", {}))


def is_said(model: PreTrainedModel) -> bool:
    """Whether the configuration, and so what is saved of it, says that output head and input table are one weight."""
    return _is_tie_of_head(model, model.get_expanded_tied_weights_keys(all_submodels=True))


def _is_tie_of_head(model: PreTrainedModel, ties: Mapping[str, str]) -> bool:
    names = {id(module): name for name, module in model.named_modules()}
    table, head = (names.get(id(m)) for m in (model.get_input_embeddings(), model.get_output_embeddings()))
    return head is not None and ties.get(f"{head}.weight") == f"{table}.weight"
