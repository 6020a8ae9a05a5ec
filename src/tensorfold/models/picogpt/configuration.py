"""Configuration of PicoGPT: its sizes."""

from __future__ import annotations

import importlib
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from tensorfold.errors import InputError


class PicoGPTConfig(PreTrainedConfig):
    """Sizes of a PicoGPT; the defaults are those of the public code (y-javanmard/mpo-picogpt): 808,448 parameters.

    Args:
        vocab_size: Number of characters.
        hidden_size: Width; even, and a multiple of the heads.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Number of heads in a block.
        intermediate_size: Number of hidden units of a block's MLP.
        max_position_embeddings: Longest context, in characters. Positions are computed, so none is a parameter.
        initializer_range: Standard deviation of new linear weights; biases start at 0, norms as the identity.
        embedding_std: Standard deviation of new token rows.
        layer_norm_eps: Number added to the variance in layer norms.
        use_cache: Whether a forward gives a KV cache by default.
        tie_word_embeddings: Whether output head and token table share a weight.

    Raises:
        InputError: The width cannot be divided among the heads, or is odd.
    """

    model_type = "picogpt"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (as every configuration of transformers has it)

    def __init__(
        self,
        vocab_size: int = 65,
        hidden_size: int = 128,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        intermediate_size: int = 512,
        max_position_embeddings: int = 256,
        initializer_range: float = 0.02,
        embedding_std: float = 0.02,
        layer_norm_eps: float = 1e-5,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **options: Any,
    ) -> None:
        if hidden_size % 2 or hidden_size % num_attention_heads:
            raise InputError(
                f"PicoGPTConfig: hidden_size={hidden_size} with num_attention_heads={num_attention_heads}; needed an "
                "even multiple of the heads."
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.embedding_std = embedding_std
        self.layer_norm_eps = layer_norm_eps
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **options)
        # transformers looks for a model's class once it has its configuration, so this is early enough; any earlier
        # would meet transformers' own imports half done.
        importlib.import_module("tensorfold.models.picogpt.modeling")


AutoConfig.register(PicoGPTConfig.model_type, PicoGPTConfig)
