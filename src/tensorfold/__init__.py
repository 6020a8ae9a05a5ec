"""Tensorfold folds the weights of transformer language models into chains of small tensors.

Importing it also teaches transformers to load folded checkpoints, and peft to adapt them. Everything heavy is imported
on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from tensorfold import nn
    from tensorfold.algebra.specs.spec import Spec
    from tensorfold.benchmark.run import bench
    from tensorfold.errors import InputError, SpecError, TensorfoldError
    from tensorfold.evaluation.perplexity import evaluate
    from tensorfold.export.hub import push_to_hub
    from tensorfold.folding.from_disk import fold_directory
    from tensorfold.folding.in_memory import fold
    from tensorfold.folding.plan import plan
    from tensorfold.healing.heal import heal
    from tensorfold.hf.int8 import quantize
    from tensorfold.hf.loading import load
    from tensorfold.hf.vocabulary import append_tokens
    from tensorfold.methods import MPO, Graded, Kronecker, LowRank, SharedExperts, TokenMPS
    from tensorfold.methods.auto import Auto
    from tensorfold.recipes.recipe import Recipe, Rule
    from tensorfold.report.page import write_report

__version__ = "0.1.0"

# Public name -> the module that defines it. No module has the name of a function, so neither hides the other.
_HOME = {
    "Auto": "methods.auto",
    "Graded": "methods",
    "InputError": "errors",
    "Kronecker": "methods",
    "LowRank": "methods",
    "SharedExperts": "methods",
    "MPO": "methods",
    "Recipe": "recipes.recipe",
    "Rule": "recipes.recipe",
    "Spec": "algebra.specs.spec",
    "SpecError": "errors",
    "TensorfoldError": "errors",
    "TokenMPS": "methods",
    "append_tokens": "hf.vocabulary",
    "bench": "benchmark.run",
    "evaluate": "evaluation.perplexity",
    "fold": "folding.in_memory",
    "fold_directory": "folding.from_disk",
    "heal": "healing.heal",
    "load": "hf.loading",
    "plan": "folding.plan",
    "push_to_hub": "export.hub",
    "quantize": "hf.int8",
    "write_report": "report.page",
}

__all__ = [
    "MPO",
    "Auto",
    "Graded",
    "InputError",
    "Kronecker",
    "LowRank",
    "Recipe",
    "Rule",
    "SharedExperts",
    "Spec",
    "SpecError",
    "TensorfoldError",
    "TokenMPS",
    "append_tokens",
    "bench",
    "evaluate",
    "fold",
    "fold_directory",
    "heal",
    "load",
    "nn",
    "plan",
    "push_to_hub",
    "quantize",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name == "nn":
        return importlib.import_module("tensorfold.nn")
    if name not in _HOME:
        raise AttributeError(f"module 'tensorfold' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"tensorfold.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


@wrapt.when_imported("transformers.modeling_utils")
def _register(_: Any) -> None:
    """Register the quantizer once transformers' loading code is imported, and not before: that takes seconds."""
    importlib.import_module("tensorfold.hf.quantizer")


@wrapt.when_imported("transformers.models.auto.configuration_auto")
def _register_picogpt(_: Any) -> None:
    """Register PicoGPT's configuration as soon as there is anything to register it with."""
    importlib.import_module("tensorfold.models.picogpt.configuration")


@wrapt.when_imported("peft.tuners.lora.config")
def _register_lora(_: Any) -> None:
    """Let peft adapt folded layers."""
    importlib.import_module("tensorfold.hf.lora")


@wrapt.when_imported("peft.peft_model")
def _register_prompt_tuning(module: Any) -> None:
    """Let peft find folded tables."""
    importlib.import_module("tensorfold.hf.tunings").teach_prompt_tuning(module)


@wrapt.when_imported("peft.tuners.trainable_tokens.layer")
def _register_trainable_tokens(module: Any) -> None:
    """Let peft say why tokens of a folded table cannot be trained one by one."""
    importlib.import_module("tensorfold.hf.tunings").teach_trainable_tokens(module)
