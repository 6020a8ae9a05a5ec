"""A model in evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within it the model is in evaluation mode; afterwards every module is in the mode that it was in.

    A module that was put in meanwhile, as folding does, gets the mode that the model itself was in.
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
