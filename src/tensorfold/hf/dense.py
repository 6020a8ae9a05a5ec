"""Conversion of a folded model to the plain transformers model with the products of its cores for weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tensorfold.errors import InputError, TensorfoldError, pass_on_memory, reason
from tensorfold.hf.config import TensorfoldConfig
from tensorfold.hf.ties import settled_config
from tensorfold.models.anatomy import check_no_adapter, dense_weight
from tensorfold.models.linear_maps import check_weights, orientation
from tensorfold.nn import FoldedModule, FoldedTable, StackedLinear
from tensorfold.nn.experts import ExpertStack


def plain_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Copy of a model's configuration without folding, which ties head and table if the weights are tied."""
    folded = isinstance(model.get_input_embeddings(), FoldedModule)  # its ties are those of its configuration
    config = copy.deepcopy(model.config) if folded else settled_config(model)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


@torch.no_grad()
def plain_model(model: PreTrainedModel) -> PreTrainedModel:
    """Convert a model to its architecture's own modules, with every folded matrix multiplied out.

    Linear layers, ``Conv1D`` and embeddings are the architecture's own again, parts of a fused matrix are one matrix,
    scalars and index orders are in the weights, tied heads are tied. Products are taken in float32 at least.

    Args:
        model: Folded or not; it is not changed. Tensors that were not folded are shared with the result.

    Raises:
        InputError: The model is quantised by something else.
        TensorfoldError: Its weights are not those of its configuration.
    """
    check_floating(model)
    with torch.device("meta"):
        plain: PreTrainedModel = type(model)._from_config(plain_config(model))
    try:
        plain.load_state_dict(_plain_state(model, plain), strict=True, assign=True)
    except RuntimeError as error:
        pass_on_memory(error)
        raise TensorfoldError(
            f"{type(model).__name__}: its weights do not fit the plain {type(plain).__name__} of its configuration "
            f"({reason(error)}); save it with save_pretrained and export what was saved."
        ) from error
    _fill_buffers(plain, model)
    plain.tie_weights()
    if model.can_generate():
        plain.generation_config = copy.deepcopy(model.generation_config)
    return plain.train(model.training)


def become_plain(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Convert a folded model to its architecture's own modules in place, as :func:`plain_model` does to a new one.

    Args:
        model: Folded or not.
        dtype: Dtype of the weights afterwards; their own if None.

    Raises:
        InputError: The model is in int8, or quantised by something else.
    """
    plain = plain_model(model)
    for name, module in _replaced(model).items():  # and no others, on which hooks may hang
        if isinstance(module, ExpertStack):
            owner, _, attribute = name.rpartition(".")
            del model.get_submodule(owner)._modules[attribute]
            setattr(model.get_submodule(owner), attribute, plain.get_parameter(name))
        else:
            model.set_submodule(name, plain.get_submodule(name))
    for own in ("_tied_weights_keys", "resize_token_embeddings", "_weight_conversions"):
        model.__dict__.pop(own, None)
    model.all_tied_weights_keys = plain.all_tied_weights_keys
    return model if dtype is None else model.to(dtype)  # type: ignore[arg-type]


def check_in_memory(model: PreTrainedModel) -> None:
    """Check that no weight is on the meta device, where accelerate's offloading leaves weights.

    Raises:
        InputError: One is.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise InputError(f"{name} is offloaded (meta device); needed weights in memory: load without device_map.")


def check_floating(model: PreTrainedModel) -> None:
    """Check that all weights are in memory, in floating point and the model's own.

    Raises:
        InputError: They are packed by another quantizer, in int8, offloaded or computed, or the model has an adapter.
    """
    check_no_adapter(model)
    check_in_memory(model)
    check_weights(model)
    quantizer = getattr(model, "hf_quantizer", None)
    config = getattr(quantizer, "quantization_config", None)
    if isinstance(config, TensorfoldConfig) and config.int8:
        raise InputError("the model is in int8; needed floating-point weights: start from what was quantised.")
    if quantizer is not None and not isinstance(config, TensorfoldConfig):
        method = getattr(model.config.quantization_config, "quant_method", "unknown method")
        raise InputError(f"the model is quantised ({method}); needed floating-point weights: load it dequantised.")


def _plain_state(model: PreTrainedModel, plain: PreTrainedModel) -> dict[str, Tensor]:
    """State dictionary for the plain model, with the folded model's matrices multiplied out."""
    replaced = _replaced(model)
    inside = tuple(f"{name}." for name in replaced)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)}
    products: dict[int, Tensor] = {}  # by first core: a tied head is multiplied out once
    for name, module in replaced.items():
        if isinstance(module, ExpertStack):
            state[name] = module.tensor()
            continue
        key = id(next(module.parameters()))
        if key not in products:
            transposed = orientation(plain.get_submodule(name)) == "in-out"
            weight = _weight(module)
            products[key] = (weight.T if transposed else weight).contiguous()
        state[f"{name}.weight"] = products[key]
        bias = _bias(module)
        if bias is not None:
            state[f"{name}.bias"] = bias
    return state


def _replaced(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Folded modules and matrices that were split into parts, by name; parts of a matrix are not listed."""
    kinds = FoldedModule | StackedLinear | ExpertStack
    ours = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    return {name: module for name, module in ours.items() if name.rpartition(".")[0] not in ours}


def _weight(module: nn.Module) -> Tensor:
    """Shape (out, in)."""
    if isinstance(module, StackedLinear):
        return torch.cat([_weight(part) for part in module])
    if isinstance(module, FoldedModule):
        dtype = module.cores[0].dtype
        return module.to_dense(torch.promote_types(dtype, torch.float32)).to(dtype)
    return dense_weight(module)


def _bias(module: nn.Module) -> Tensor | None:
    if isinstance(module, StackedLinear):
        biases = [bias for part in module if (bias := _bias(part)) is not None]
        return torch.cat(biases) if biases else None
    return getattr(module, "bias", None)


def _fill_buffers(plain: PreTrainedModel, model: PreTrainedModel) -> None:
    """Copy to the plain model the buffers that no checkpoint holds, such as rotary frequencies."""
    known = dict(model.named_buffers())
    for name, buffer in list(plain.named_buffers()):
        if not buffer.is_meta:
            continue
        owner, _, attribute = name.rpartition(".")
        value = known.get(name)
        if value is None:
            # Only a replaced embedding can have taken a buffer with it, and all it had was its scale.
            embedding = model.get_submodule(owner)
            assert isinstance(embedding, FoldedTable)
            value = torch.full(buffer.shape, embedding.scale, dtype=buffer.dtype, device=model.device)
        setattr(plain.get_submodule(owner), attribute, value)
