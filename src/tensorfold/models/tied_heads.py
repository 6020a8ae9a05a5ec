"""The tie of output head and input table: by weights, by transformers' promise, by the configuration."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel


def tied_head(model: PreTrainedModel) -> str | None:
    """Name of the output head if it shares the input table's weight, else None.

    The weights decide where there are any: one tensor, or, where the configuration promises a tie, two of equal values.
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
    """Whether the configuration says that output head and input table share a weight, or transformers lists them so.

    Where a checkpoint has a head of other values, transformers parts the two and leaves the configuration as it is.
    """
    return is_said(model) or _is_tie_of_head(model, getattr(model, "all_tied_weights_keys", {}))


def is_said(model: PreTrainedModel) -> bool:
    """Whether the configuration, and so the file that it is saved to, ties the output head to the input table."""
    return _is_tie_of_head(model, model.get_expanded_tied_weights_keys(all_submodels=True))


def _is_tie_of_head(model: PreTrainedModel, ties: Mapping[str, str]) -> bool:
    """Whether ties, full names of targets to those of sources, tie the head's weight to the table's."""
    names = {id(module): name for name, module in model.named_modules()}
    table, head = (names.get(id(m)) for m in (model.get_input_embeddings(), model.get_output_embeddings()))
    return head is not None and ties.get(f"{head}.weight") == f"{table}.weight"
