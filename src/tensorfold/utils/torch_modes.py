"""Independence of PyTorch's modes (inference mode, autocast, default dtype) that the calling code has set."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.func import functional_call

from tensorfold.errors import InputError, pass_on_memory

P = ParamSpec("P")
R = TypeVar("R")

_DEVICES = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def usual_modes() -> Iterator[None]:
    """Enable gradients, leave autocast and inference mode, and set float32 as the default dtype, for a ``with`` block.

    Tensors made under ``torch.inference_mode`` could never be trained, and results would depend on the caller's default
    dtype and autocast.
    """
    before = torch.get_default_dtype()
    with ExitStack() as modes:
        # Leaving inference mode switches gradients on, so the order of these two matters.
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
    """Decorate a function so that its results do not depend on its caller's modes; see :func:`usual_modes`."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with usual_modes():
            return function(*args, **kwargs)

    return wrapped


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16 matrices."""
    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


@contextmanager
def rounded_products(wanted: bool = True) -> Iterator[None]:
    """Let products of float32 matrices round their inputs, for a ``with`` block; their sums stay in float32.

    To bfloat16 on processors for which oneDNN does so, those with AMX, and to TensorFloat-32 on CUDA devices.
    Everything else, and every dtype, is as before, so any model's code bears it. A product is off by 2e-3 of its size,
    and takes half to a third of the time.

    Args:
        wanted: False leaves everything as it is.
    """
    with ExitStack() as restored:
        changes = [(torch.backends.cuda.matmul, "tf32")]
        if multiplies_bfloat16():
            changes.append((torch.backends.mkldnn.matmul, "bf16"))  # type: ignore[attr-defined]
        for backend, precision in changes if wanted else ():
            restored.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
            backend.fp32_precision = precision
        yield


def bears_bfloat16(model: nn.Module, forward: Callable[[], object]) -> bool:
    """Whether a float32 model on the CPU is the faster under autocast to bfloat16, and its code bears it.

    Args:
        model: The model.
        forward: Runs a little of it; raises ``RuntimeError`` where the model's code does not expect the dtype that
            products then have.
    """
    if not multiplies_bfloat16() or any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        return False
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            forward()
    except RuntimeError as error:
        pass_on_memory(error)
        return False
    return True


def forward_in_bfloat16(model: nn.Module, **trial: Any) -> Callable[..., Any]:
    """The forward pass of a model with a copy of its weights in bfloat16; the model itself where that gains nothing.

    That is where the processor has no instructions for such products, where weights are not float32 on the CPU, and
    where the model's code does not bear the dtype. The model and its buffers stay as they are; the copy lives as long
    as the result, and takes half of the weights' memory.

    Args:
        model: The model.
        trial: Arguments of a short forward pass, which is tried.
    """
    parameters = dict(model.named_parameters())
    held = all(each.dtype == torch.float32 and each.device.type == "cpu" for each in parameters.values())
    if not held or not multiplies_bfloat16():
        return model
    with torch.inference_mode(False), torch.no_grad():
        copies = {name: parameter.bfloat16() for name, parameter in parameters.items()}
        try:
            functional_call(model, copies, (), trial)
        except RuntimeError as error:
            pass_on_memory(error)
            return model
    return lambda **inputs: functional_call(model, copies, (), inputs)


def check_takes_gradients(model: nn.Module, what: str) -> None:
    """Raise :class:`InputError` for a model that was made under ``torch.inference_mode`` and cannot have gradients.

    Args:
        model: The model to be trained.
        what: Beginning of the message.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise InputError(
                f"{what}: {name} was made under torch.inference_mode, and can have no gradients; needed a model that "
                "was loaded outside of it."
            )
