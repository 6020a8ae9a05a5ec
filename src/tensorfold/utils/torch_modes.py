"""PyTorch's modes of the calling code, kept out of what computes numbers of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from tensorfold.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")

_DEVICES = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def usual_modes() -> Iterator[None]:
    """Gradients, no autocast and float32 as the default dtype, whatever the code around has switched on.

    Tensors made under ``torch.inference_mode`` could never be trained, and sums in the caller's default dtype or under
    his autocast would be others.
    """
    before = torch.get_default_dtype()
    with ExitStack() as modes:
        # Both orders matter: leaving inference mode switches gradients on, too.
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        for kind in _DEVICES:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                modes.enter_context(torch.autocast(kind, enabled=False))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def in_usual_modes(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that it gives the same under every mode of its caller; see :func:`usual_modes`."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with usual_modes():
            return function(*args, **kwargs)

    return wrapped


def check_takes_gradients(model: nn.Module, what: str) -> None:
    """Raise :class:`InputError` for a model that was made under ``torch.inference_mode`` and can have no gradients."""
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise InputError(
                f"{what}: {name} was made under torch.inference_mode, and can have no gradients; needed a model that "
                "was loaded outside of it."
            )
