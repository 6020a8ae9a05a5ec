"""Size of a model where it is stored."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from tensorfold.models.tied_heads import tied_head


def stored_bytes(model: nn.Module) -> int:
    """Bytes that a checkpoint of a model holds: parameters, shared ones once, and buffers as they are stored."""
    parameters = {id(parameter) for parameter in model.parameters()}
    state = model.state_dict(keep_vars=True)
    buffers = sum(tensor.nbytes for tensor in state.values() if id(tensor) not in parameters)
    size = buffers + sum(parameter.nbytes for parameter in model.parameters())
    if not isinstance(model, PreTrainedModel) or tied_head(model) is None:
        return size
    own, shared = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    return size if own is shared else size - own.nbytes  # tied by equal values
