"""Architectures of GGUF files: which transformers model is which of llama.cpp's, its settings, and its tensors.

llama.cpp rotates neighbouring numbers of a head where transformers' Llama rotates the two halves, so rows of queries
and keys of the architecture "llama" are turned: row (half, k) of a head goes to (k, half).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tensorfold.errors import InputError, TensorfoldError
from tensorfold.nn import FoldedModule, StackedLinear


@dataclass(frozen=True)
class Layout:
    """An architecture of llama.cpp's.

    ``name``: in the file. ``must``: settings of the configuration that it has no other value of. ``turned``: whether
    rows of queries and keys are.
    """

    name: str
    must: dict[str, tuple[Any, ...]]
    turned: bool = False


_GATED: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",)}
_LLAMA = Layout("llama", _GATED | {"attention_bias": (False,), "mlp_bias": (False,)}, turned=True)
LAYOUTS = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Layout("qwen2", _GATED),
    "Qwen3ForCausalLM": Layout("qwen3", _GATED | {"attention_bias": (False,)}),
    "GPT2LMHeadModel": Layout(
        "gpt2",
        {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
    ),
}


def layout_of(model: PreTrainedModel) -> Layout:
    """The architecture that computes what ``model`` does.

    Raises:
        InputError: There is none, or the model has factors.
    """
    name, config = type(model).__name__, model.config
    folded = [where for where, module in model.named_modules() if isinstance(module, FoldedModule | StackedLinear)]
    if folded:
        raise InputError(
            f"export --to gguf: {len(folded)} matrices are factors, {folded[0]} first, and llama.cpp multiplies whole "
            "matrices only; needed a plain model. Take --to onnx or openvino, which keep the factors, or --to dense "
            "first, which multiplies them out; auto with plain: true folds to a plain model that is smaller."
        )
    layout = LAYOUTS.get(name)
    if layout is None:
        raise InputError(f"export --to gguf: got {name}; needed one of {', '.join(LAYOUTS)}. Take --to onnx.")
    for setting, allowed in layout.must.items():
        value = getattr(config, setting, allowed[0])
        if value not in allowed:
            raise _unknown(layout, f"{setting} = {value!r}")
    positions, window = getattr(config, "max_position_embeddings", 0), getattr(config, "sliding_window", None)
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if window is not None and windowed and window < positions:
        raise _unknown(layout, f"attention to the last {window} tokens alone")
    _rotation(layout, config)
    return layout


def _unknown(layout: Layout, what: str) -> InputError:
    return InputError(f"export --to gguf: architecture {layout.name!r} of llama.cpp has no {what}. Take --to onnx.")


def _rotation(layout: Layout, config: PreTrainedConfig) -> dict[str, Any]:
    """The configuration's rotary settings, empty where it has none."""
    rotation = dict(getattr(config, "rope_parameters", None) or {})
    if rotation.get("rope_type", "default") not in ("default", "linear", "llama3"):
        raise _unknown(layout, f"rotation of type {rotation['rope_type']!r} that is known here")
    if rotation.get("partial_rotary_factor", 1.0) != 1.0:
        raise _unknown(layout, "rotation of a part of a head")
    return rotation


def scaled(config: PreTrainedConfig) -> bool:
    """Whether rotary frequencies are other than powers of a base."""
    return (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") != "default"


def write_settings(writer: Any, layout: Layout, model: PreTrainedModel) -> None:
    """Add the sizes of a model to a ``gguf.GGUFWriter``."""
    config = model.config
    heads, width = config.num_attention_heads, config.hidden_size
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_head_count(heads)
    if layout.name == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * width)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    size, rotation = head_size(config), _rotation(layout, config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(rotation["rope_theta"]))
    if rotation["rope_type"] == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rotation["factor"]))


def head_size(config: PreTrainedConfig) -> int:
    """How many numbers a query of one head has."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def tensors(layout: Layout, model: PreTrainedModel) -> Iterator[tuple[str, np.ndarray, bool]]:
    """Names of the file, weights (float32; matrices with outputs first), and whether fewer bits are for them.

    Raises:
        TensorfoldError: A weight has no name in this architecture.
    """
    import gguf

    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == layout.name)
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    if scaled(model.config) and model.config.rope_parameters["rope_type"] == "llama3":
        yield "rope_freqs.weight", _frequency_divisors(model.config), False
    held: set[int] = set()  # a tied head is the table
    for name, weight in model.named_parameters(remove_duplicate=True):
        if id(weight) in held:
            continue
        held.add(id(weight))
        owner, _, kind = name.rpartition(".")
        found = names.get_name(owner)
        if found is None:
            raise TensorfoldError(f"export --to gguf: {name} has no name in architecture {layout.name!r} of llama.cpp.")
        value = weight.detach()
        if kind == "weight" and isinstance(model.get_submodule(owner), Conv1D):
            value = value.T
        if layout.turned and owner.endswith(("q_proj", "k_proj")):
            value = _turned(value, head_size(model.config))
        positions = found == "position_embd"  # added to the table's rows, so as exact as these are summed
        yield f"{found}.{kind}", value.contiguous().numpy(), value.dim() == 2 and not positions


def _turned(rows: Tensor, size: int) -> Tensor:
    """Rows (heads · 2 · size/2, n) of heads with halves interleaved: (heads · size/2 · 2, n)."""
    return rows.reshape(-1, 2, size // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _frequency_divisors(config: PreTrainedConfig) -> np.ndarray:
    """What Llama 3.1 divides rotary frequencies by, shape (head size / 2,): plain powers over transformers' own."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    size = head_size(config)
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2).double() / size)
    scaled_frequencies, factor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert math.isclose(factor, 1.0)
    return (plain / scaled_frequencies.double()).float().numpy()
