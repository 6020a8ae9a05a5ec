"""Patches of peft's prompt tuning and trainable tokens for folded embedding tables.

Prompt tuning looks for the table among the parameters, by a size that no core has; trainable tokens replace rows of a
dense weight. Importing peft calls the functions here once each (see ``tensorfold/__init__.py``).
"""

from __future__ import annotations

from typing import Any

import wrapt
from torch import nn

from tensorfold.errors import InputError
from tensorfold.nn import FoldedModule
from tensorfold.nn.int8 import Int8Embedding, Int8Folded

_TABLE = "embeddings.word_embeddings"  # name of BERT's table, where peft looks first


def teach_prompt_tuning(module: Any) -> None:
    """Patch ``PeftModel`` in the module ``peft.peft_model``, so that prompt tuning finds a folded table."""

    @wrapt.patch_function_wrapper(module, "PeftModel._setup_prompt_encoder")
    def _(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        base = instance.base_model
        table = base.get_input_embeddings()
        if not _is_ours(table):
            return wrapped(*args, **kwargs)
        own = base.get_submodule
        base.get_submodule = lambda name: table if name == _TABLE else own(name)
        try:
            return wrapped(*args, **kwargs)
        finally:
            del base.get_submodule


def teach_trainable_tokens(module: Any) -> None:
    """Patch ``TrainableTokensLayer`` in ``peft.tuners.trainable_tokens.layer`` to refuse a table without own rows."""

    @wrapt.patch_function_wrapper(module, "TrainableTokensLayer.update_layer")
    def _(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        table = instance.get_base_layer()
        if _is_ours(table):
            raise InputError(
                f"trainable tokens: the embedding is a {type(table).__name__}, which has no rows to replace; needed a "
                "dense table. Leave the embedding out of what is folded."
            )
        return wrapped(*args, **kwargs)


def _is_ours(table: nn.Module) -> bool:
    """Whether an embedding is folded or in int8."""
    return isinstance(table, FoldedModule | Int8Embedding | Int8Folded)
