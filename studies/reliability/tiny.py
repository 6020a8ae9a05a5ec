"""Tiny random models of every causal language model type of transformers, from their configurations' own fields."""

from __future__ import annotations

import inspect
from random import Random
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

VOCABULARY = 300
_WIDTH = (
    "hidden_size",
    "d_model",
    "n_embd",
    "dim_model",
    "embed_dim",
    "word_embed_proj_dim",
    "emb_dim",
    "embedding_size",
)
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads")
_INNER = (
    "intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "d_ff", "dim_ff", "d_inner",
    "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size", "ffn_hidden_size",
    "dense_intermediate_size", "intermediate_size_mlp", "moe_shared_expert_intermediate_size", "feed_forward_size",
    "expert_ffn_hidden_size",
)  # fmt: skip
# Everything else that makes a default configuration large, or has to fit what is made small.
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "max_seq_len": 128,
    "seq_length": 128, "max_sequence_length": 128, "context_length": 128, "max_source_positions": 128,
    "max_target_positions": 128, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    "image_token_id": 2, "image_token_index": 2, "audio_token_id": 3, "boi_token_id": 4, "eoi_token_id": 5,
    "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8, "forced_eos_token_id": None,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "top_k": 2, "n_shared_experts": 1, "num_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "num_expert_group": 1, "moe_layer_start_index": 0, "moe_num_shared_experts": 1,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "qk_head_dim": 16, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8, "first_k_dense_replace": 1,
    "state_size": 8, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_dt_rank": 4, "time_step_rank": 4, "conv_kernel": 4,
    "ssm_state_size": 8, "mamba_n_groups": 1, "n_groups": 1, "chunk_size": 8, "mamba_chunk_size": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "sliding_window": 16, "attention_chunk_size": 16, "window_size": 16, "attention_window_size": 16,
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
    "image_size": 16, "patch_size": 8, "num_channels": 3, "num_mel_bins": 16, "type_vocab_size": 2,
    "axial_pos_shape": (8, 16), "num_codebooks": 2, "num_mem_blocks": 1, "num_memory_blocks": 1, "adapter_rank": 4,
    "num_buckets": 4, "lsh_attn_chunk_length": 8, "local_attn_chunk_length": 8, "attention_head_size": 8,
    "dropout": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "zero_expert_num": 2,
}  # fmt: skip
# What some types need beside or instead of that.
_EXTRA: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4, "n_head": 4, "n_embd": 32},
    "cpmant": {"prompt_types": 2, "prompt_length": 4, "segment_types": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "gptj": {"rotary_dim": 4, "n_head": 4, "n_embd": 32},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"], "num_hidden_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2},
    "mpt": {"expansion_ratio": 2},
    "prophetnet": {"num_decoder_layers": 2, "num_encoder_layers": 2},
    "recurrent_gemma": {"lru_width": None},
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_embds": False, "is_decoder": True},
    "xlnet": {"d_inner": 48},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zaya": {"num_experts_per_tok": 1},
}


def _fields(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """Names that the configuration takes, with the values it has by itself."""
    try:
        own = kind()
        found = {key: value for key, value in vars(own).items() if not key.startswith("_")}
    except Exception:
        found = {}
    parameters = inspect.signature(kind.__init__).parameters
    return {**{key: p.default for key, p in parameters.items() if p.default is not p.empty}, **found}


def _settings(
    kind: type[PreTrainedConfig], random: Random, width: int, heads: int, layers: int, absent: bool
) -> dict[str, Any]:
    """Small values for the fields it has; with ``absent`` also for those that are None by default."""
    fields = _fields(kind)
    attributes = getattr(kind, "attribute_map", {})
    known = {*fields, *attributes}
    inner = width * random.choice((1, 2, 3)) // 1 + random.choice((0, 16))
    out: dict[str, Any] = {}
    for names, value in ((_WIDTH, width), (_LAYERS, layers), (_HEADS, heads), (_INNER, inner)):
        out.update({name: value for name in names if name in known})
    out.update(
        {name: value for name, value in _SMALL.items() if name in known and (absent or fields.get(name, 0) is not None)}
    )
    # Heads that share keys: a divisor, or all.
    for name in ("num_key_value_heads", "num_kv_heads", "n_head_kv"):
        if name in known:
            out[name] = random.choice((heads, max(1, heads // 2)))
    for name in ("head_dim", "kv_channels", "attention_head_dim", "d_kv", "global_head_dim", "swa_head_dim", "d_head"):
        if name in known:
            out[name] = width // heads
    for name in ("mamba_n_heads", "mamba_num_heads"):
        if name in known:
            out[name] = 8
    for name in ("mamba_d_head", "mamba_head_dim"):
        if name in known:
            out[name] = width // 4
    # One entry a layer: the kinds that the default has, in its order, so that each of the first few is there.
    for name, value in fields.items():
        per_layer = isinstance(value, list | tuple) and value and name not in ("architectures", *out)
        if name in ("layer_types", "layers_block_type", "mlp_layer_types", "block_types") and per_layer:
            kinds = list(dict.fromkeys(value))
            out[name] = [kinds[index % len(kinds)] for index in range(layers)]
    # Hybrids say how often the other kind comes; twice in so few layers.
    for name in ("full_attention_interval", "sliding_window_pattern", "global_attn_every_n_layers"):
        if name in known and fields.get(name) is not None:
            out[name] = 2
    return out


def tiny_configs(model_type: str, seed: int) -> list[PreTrainedConfig]:
    """Configurations to try, most thorough first; whether a model can be built from them is for the caller to see."""
    kind = CONFIG_MAPPING[model_type]
    fields = _fields(kind)
    found = []
    for attempt in range(8):
        random = Random(f"{seed}:{model_type}:{attempt}")
        heads = random.choice((2, 4))
        width = heads * random.choice((8, 16))
        settings = _settings(kind, random, width, heads, random.choice((2, 3)) if attempt < 3 else 2, attempt in (4, 5))
        if attempt in (2, 5, 6):  # perhaps what was given by layer is worked out better by the configuration itself
            settings = {key: value for key, value in settings.items() if not isinstance(value, list)}
        for name, value in fields.items():
            if not isinstance(value, PreTrainedConfig) or name == "attn_config":  # MPT's has names of sizes, and none
                continue
            inner = _settings(type(value), random, width, heads, 2, attempt in (4, 5))
            if attempt in (3, 5):
                inner["hidden_size_per_layer_input"] = 0
            if inner:
                settings[name] = {**inner, "model_type": value.model_type} if value.model_type else inner
        if attempt < 4:
            settings["is_decoder"] = True
            settings["tie_word_embeddings"] = random.random() < 0.5
        settings.update(_EXTRA.get(model_type, {}))
        try:
            found.append(kind(**settings))
        except Exception:
            continue
    return found
