"""Contexts that give a model back as it was: its evaluation mode, and all of it where something fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

_TABLES = ("_modules", "_parameters", "_buffers")


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


@contextmanager
def as_it_was_on_failure(model: nn.Module) -> Iterator[None]:
    """Give a model back its modules, weights, attributes and configuration if what is done meanwhile fails.

    Modules that are replaced meanwhile stay in memory until the context closes.
    """
    owners = [*model.modules(), *(config for config in [getattr(model, "config", None)] if config is not None)]
    before = [
        (owner, {name: dict(value) if name in _TABLES else value for name, value in vars(owner).items()})
        for owner in owners
    ]
    try:
        yield
    except BaseException:
        for owner, attributes in before:
            vars(owner).clear()
            vars(owner).update(attributes)
        raise
