"""Evaluation mode of a model, for as long as a context is open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode while the context is open; then every module gets back the mode that it had.

    A module that was put in meanwhile, as folding does, gets the mode that the model itself had.
    """
    whole = model.training
    # Weak, so that the weights of modules that are replaced meanwhile can be freed.
    before = WeakKeyDictionary({module: module.training for module in model.modules()})
    model.eval()
    try:
        yield
    finally:
        for module in model.modules():
            module.training = before.get(module, whole)
