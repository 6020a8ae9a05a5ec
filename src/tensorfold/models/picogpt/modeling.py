"""PicoGPT: a pre-norm decoder with sinusoidal positions, ReLU and no dropout (public code y-javanmard/mpo-picogpt).

    h = E[token] + P[position];  h += Attention(LN(h));  h += W2 ReLU(W1 LN(h) + b1) + b2;  logits = W LN(h)

Query, key and value have no bias, the other matrices in a block have one; the output head has none, and is not tied
unless the configuration says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from tensorfold.errors import InputError
from tensorfold.models.picogpt.configuration import PicoGPTConfig


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Sinusoidal positions ``P[p, 2k] = sin(p / 10000^(2k/width))``, ``P[p, 2k+1] = cos(…)``, in fp32.

    Shape (...) → (..., width). Source: Vaswani et al., arXiv 1706.03762. They are computed where needed: a table in a
    buffer would not survive loading.
    """
    even = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device)
    angles = positions[..., None].float() * (1.0 / 10000 ** (even / width))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def attention_mask_for(past: int, length: int, padding: Tensor | None, device: torch.device) -> Tensor:
    """Causal mask, True where a query sees a key: shape (length, keys), or (batch, 1, length, keys) with padding.

    Args:
        past: Number of keys already in the cache.
        length: Number of queries, which are the last of all keys.
        padding: Shape (batch, keys), 0 for padding; None for none.
        device: Device of the mask.
    """
    keys = torch.arange(past + length, device=device)
    queries = keys[past:, None]
    seen = keys <= queries
    if padding is None:
        return seen
    # Padding sees itself: a row without any key would be a softmax over nothing, NaN.
    return seen & (padding[:, None, None, :].bool() | (keys == queries))


def eager_attention(
    _: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **__: Any
) -> tuple[Tensor, Tensor]:
    """Attention ``softmax(scaling · Q Kᵀ) V`` with its probabilities.

    Args:
        query: Shape (batch, heads, length, head_dim).
        key: Shape (batch, heads, keys, head_dim).
        value: Shape (batch, heads, keys, head_dim).
        mask: True where a query sees a key, shape (length, keys) or (batch, 1, length, keys).
        scaling: Factor on inner products.

    Returns:
        Output, (batch, length, heads, head_dim), and probabilities, (batch, heads, length, keys).
    """
    scores = (query @ key.transpose(-2, -1) * scaling).masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


@contextmanager
def _attention_precision(query: Tensor) -> Iterator[torch.dtype]:
    """Dtype that attention computes in: fp32 where autocast would choose bf16 on a CPU, else the states' own.

    The CPU's fused attention is slower backwards in bf16 than in fp32 at 32 numbers a head (torch 2.13).
    """
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            yield torch.float32
    else:
        yield query.dtype


class PicoGPTAttention(nn.Module):
    """Causal self-attention, head by head ``softmax(Q Kᵀ / √d) V``."""

    def __init__(self, config: PicoGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        width = config.hidden_size
        self.head_dim = width // config.num_attention_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor, mask: Tensor | None, cache: Cache | None) -> tuple[Tensor, Tensor | None]:
        """Output, (batch, length, width), and the probabilities, (batch, heads, length, keys), if eager; else None.

        Args:
            hidden: Shape (batch, length, width).
            mask: True where a query sees a key; None for causal attention over the given positions alone.
            cache: Keys and values so far, which grows; None for none.
        """
        batch, length, width = hidden.shape
        heads = (batch, length, -1, self.head_dim)
        query, key, value = (
            project(hidden).view(heads).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )  # (batch, heads, length, head_dim) each
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        with _attention_precision(query) as precision:
            query, key, value = (states.to(precision) for states in (query, key, value))
            mixed, weights = attend(self, query, key, value, mask, scaling=self.head_dim**-0.5)
        return self.o_proj(mixed.reshape(batch, length, width)), weights


class PicoGPTMLP(nn.Module):
    """MLP of a block, ``W2 ReLU(W1 x + b1) + b2``."""

    def __init__(self, config: PicoGPTConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Shape ``(..., width)`` → ``(..., width)``."""
        return self.down_proj(F.relu(self.up_proj(hidden)))


class PicoGPTLayer(GradientCheckpointingLayer):
    """One block: attention and MLP, each after its own layer norm and added to the stream."""

    def __init__(self, config: PicoGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = PicoGPTAttention(config, layer_idx)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = PicoGPTMLP(config)

    def forward(
        self, hidden: Tensor, mask: Tensor | None = None, past_key_values: Cache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Output, shape (batch, length, width), and the attention's probabilities if eager; else None."""
        mixed, weights = self.attention(self.attention_norm(hidden), mask, past_key_values)
        hidden = hidden + mixed
        return hidden + self.mlp(self.mlp_norm(hidden)), weights


class PicoGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """PicoGPT with its head, 808,448 parameters by default: 25 matrices, 3,072 biases, 65 token rows and 9 norms."""

    config_class = PicoGPTConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["PicoGPTLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012  (where the configuration ties them)

    def __init__(self, config: PicoGPTConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PicoGPTLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.embedding_std)
        else:
            super()._init_weights(module)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next character, shape (batch, length, vocabulary).

        Args:
            input_ids: Tokens, shape (batch, length).
            attention_mask: 0 for padding, shape (batch, past + length).
            position_ids: Shape (batch, length) or (1, length); counted from the first that is no padding if None.
            past_key_values: KV cache of the positions so far.
            inputs_embeds: Token rows without positions, (batch, length, width), instead of ``input_ids``.
            labels: Tokens, shape (batch, length), -100 to leave out; shifted here.
            use_cache: Whether a KV cache is given back; by default the configuration says.
            output_attentions: Whether probabilities of attention are given back, likewise.
            output_hidden_states: Whether the hidden states between blocks are given back, likewise.
            logits_to_keep: Number of last positions with logits, 0 for all; or indices of positions.
            options: Passed to the loss.

        Raises:
            InputError: A context too long, neither or both kinds of input, or attention probabilities without
                ``attn_implementation="eager"``.
        """
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("PicoGPT: needed one of input_ids and inputs_embeds.")
        eager = config._attn_implementation == "eager"
        if output_attentions is None:
            output_attentions = config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_attentions and not eager:
            raise InputError(
                f"PicoGPT: output_attentions with attn_implementation={config._attn_implementation!r}, which has no "
                "probabilities to show; needed model.set_attn_implementation('eager')."
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if past_key_values is None and (config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        length = inputs_embeds.shape[1]
        # An exported graph takes any length, so no length may be looked at while it is traced.
        if not torch.compiler.is_exporting() and past + length > config.max_position_embeddings:
            raise InputError(
                f"PicoGPT: got {past + length} tokens; needed at most max_position_embeddings="
                f"{config.max_position_embeddings}. Cut the text into shorter windows."
            )
        if position_ids is None:
            if attention_mask is None:
                position_ids = torch.arange(past, past + length, device=inputs_embeds.device)[None]
            else:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, past:]
        mask = None
        if eager or attention_mask is not None or past:
            mask = attention_mask_for(past, length, attention_mask, inputs_embeds.device)

        hidden = inputs_embeds + sinusoids(position_ids, config.hidden_size).to(inputs_embeds.dtype)
        states: tuple[Tensor, ...] = ()
        attentions: tuple[Tensor, ...] = ()
        for layer in self.layers:
            if output_hidden_states:
                states += (hidden,)
            hidden, weights = layer(hidden, mask, past_key_values=past_key_values)
            if output_attentions:
                attentions += (weights,)
        hidden = self.norm(hidden)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=config.vocab_size, **options)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=(*states, hidden) if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
        )


AutoModelForCausalLM.register(PicoGPTConfig, PicoGPTForCausalLM)
