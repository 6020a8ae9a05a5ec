"""PicoGPT, the character model of the MPO paper (arXiv 2603.28534), as a model that transformers knows by name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensorfold.models.picogpt.characters import character_tokenizer
    from tensorfold.models.picogpt.configuration import PicoGPTConfig
    from tensorfold.models.picogpt.modeling import PicoGPTForCausalLM

# Modules by public name; imported on first use, since transformers imports the configuration during its own import.
_HOME = {"PicoGPTConfig": "configuration", "PicoGPTForCausalLM": "modeling", "character_tokenizer": "characters"}

__all__ = ["PicoGPTConfig", "PicoGPTForCausalLM", "character_tokenizer"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tensorfold.models.picogpt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tensorfold.models.picogpt.{_HOME[name]}"), name)
