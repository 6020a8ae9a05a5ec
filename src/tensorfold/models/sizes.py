"""Size of a model where it is stored."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from tensorfold.models.tied_heads import tied_head


def stored_bytes(model: nn.Module) -> int:
    """Bytes that a checkpoint of a model holds: parameters, shared ones once, and buffers as they are stored.

    A model whose weights are an engine's says its files' bytes itself, as ``stored_bytes``.
    """
    if isinstance(known := getattr(model, "stored_bytes", None), int):
        return known
    parameters = {id(parameter) for parameter in model.parameters()}
    state = model.state_dict(keep_vars=True)
    buffers = sum(tensor.nbytes for tensor in state.values() if id(tensor) not in parameters)
    size = buffers + sum(parameter.nbytes for parameter in model.parameters())
    if not isinstance(model, PreTrainedModel) or tied_head(model) is None:
        return size
    own, shared = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    return size if own is shared else size - own.nbytes  # tied by equal values


def stored_parameters(model: nn.Module) -> int:
    """Parameters, shared ones once; of a model whose weights are an engine's what it says as ``stored_parameters``."""
    known = getattr(model, "stored_parameters", None)
    return known if isinstance(known, int) else sum(parameter.numel() for parameter in model.parameters())


def stored_type(model: nn.Module) -> str:
    """Type of the floating-point parameters; of a model whose weights are an engine's, ``onnx int4`` and the like."""
    if isinstance(known := getattr(model, "stored_type", None), str):
        return known
    return next((str(p.dtype) for p in model.parameters() if p.is_floating_point()), "unknown").removeprefix("torch.")
