"""The device that healing trains on: accelerate chooses it for the Trainer, by environment variables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.state import AcceleratorState

from tensorfold.errors import InputError
from tensorfold.utils.devices import one_device
from tensorfold.utils.distributed import processes

_CPU, _NAMED = "ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE"


def uses_cpu() -> bool:
    """Whether to train on the CPU: there is no accelerator, or ``ACCELERATE_USE_CPU`` asks for the CPU."""
    return not torch.accelerator.is_available() or os.environ.get(_CPU, "false").lower() == "true"


def check_training(name: str | None) -> None:
    """Check that the Trainer can be told to train on a device; None leaves the choice to accelerate.

    Raises:
        InputError: It cannot, or there is no such device.
    """
    one_device(name, "healing trains on one device a process; several processes, by torchrun, have one each")
    if name is not None and (device := torch.device(name)).index:
        raise InputError(
            f"device {name!r}: transformers' Trainer takes the first {device.type} that it sees; set "
            f"CUDA_VISIBLE_DEVICES={device.index}, or its like, and give {device.type}."
        )


@contextmanager
def training_on(name: str | None) -> Iterator[None]:
    """Train on a device while the context is open; None leaves the choice to accelerate.

    Args:
        name: ``cpu``, or the first accelerator of its kind, such as ``cuda``. Several processes have one each.

    Raises:
        InputError: As :func:`check_training`.
    """
    check_training(name)
    if name is None:
        yield
        return
    device, alone = torch.device(name), processes() == 1
    chosen = {_CPU: "true" if device.type == "cpu" else "false"}
    if device.type != "cpu" and alone:
        chosen[_NAMED] = f"{device.type}:0"
    before = {key: os.environ.get(key) for key in chosen}
    os.environ.update(chosen)
    if alone:  # what was found before may be another device
        AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
        if alone:
            AcceleratorState._reset_state(reset_partial_state=True)
