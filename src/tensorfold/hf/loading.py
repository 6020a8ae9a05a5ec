"""Loading checkpoints strictly, and saving them whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

import tensorfold.hf.quantizer  # noqa: F401  (registers the quantizer)
from tensorfold.cache import atomic_directory
from tensorfold.errors import InputError, TensorfoldError
from tensorfold.report import model_card

CAUSAL_LM = "needed a decoder-only causal language model"


def load(path: str | Path, *, dtype: torch.dtype | str | None = None, **options: Any) -> PreTrainedModel:
    """Load a folded or dense causal language model from a directory (or hub id), refusing anything incomplete.

    ``from_pretrained`` only warns about missing weights and fills them with random numbers; this raises.

    Args:
        path: What ``save_pretrained`` wrote, or a hub id.
        dtype: Of the weights; as stored if None.
        options: Passed to ``from_pretrained``.

    Raises:
        InputError: No such model, or a tensor is missing, unexpected, truncated or of the wrong shape.
    """
    load_config(path)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (SafetensorError, json.JSONDecodeError, EOFError) as error:
        raise InputError(f"{path}: its weights cannot be read ({_line(error)}); copy the checkpoint again.") from None
    except (OSError, KeyError) as error:
        raise InputError(f"{path}: cannot be loaded: {_line(error)}") from None
    except (ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise InputError(f"{path}: {error}") from None
        raise InputError(f"{path}: not a loadable causal language model: {_line(error)}; {CAUSAL_LM}.") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    for kind, verb in (("missing_keys", "lacks"), ("unexpected_keys", "has unexpected"), ("mismatched_keys", "has")):
        keys = sorted(str(key[0]) if isinstance(key, tuple) else str(key) for key in info.get(kind, ()))
        if keys:
            shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            what = "tensors of the wrong shape:" if kind == "mismatched_keys" else "the tensors"
            raise InputError(f"{path}: the checkpoint {verb} {what} {shown}; it is incomplete or not of this model.")
    return model


def load_config(path: str | Path) -> PreTrainedConfig:
    """The configuration alone.

    Raises:
        InputError: There is no such model, or it is an encoder–decoder.
    """
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        local = Path(path).exists()
        reason = "has no readable config.json" if local else "no such directory, and not to be had from the hub"
        raise InputError(
            f"model {str(path)!r}: {reason}; needed a directory written by save_pretrained, a .gguf file, a hub id or "
            f"smollm2-135m. ({_line(error)})"
        ) from None
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"model {str(path)!r} is an encoder–decoder model; {CAUSAL_LM}.")
    return config


def save(model: PreTrainedModel, tokenizer: Any, path: str | Path, card: dict[str, Any]) -> None:
    """Write model, tokenizer and a README that says how to load it; whole or not at all.

    Args:
        card: What the README reports; see :func:`tensorfold.report.model_card`. Also written as ``tensorfold.json``.

    Raises:
        InputError: ``path`` exists and is not an empty directory, or cannot be written.
        TensorfoldError: The disk is full.
    """
    try:
        with atomic_directory(Path(path)) as partial:
            model.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            (partial / "README.md").write_text(model_card(card), encoding="utf-8")
            (partial / "tensorfold.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    except SafetensorError as error:
        raise TensorfoldError(f"{path}: the weights could not be written: {_line(error)}; nothing was left.") from None


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
