"""Devices by the names that users give them."""

from __future__ import annotations

import torch

from tensorfold.errors import InputError, pass_on_memory

AUTO = "auto"  # over all accelerators and the memory, as accelerate divides a model


def check_device(name: str | None) -> str | None:
    """Check that a device is there; None and ``auto`` always are.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, ``xpu``, ``auto``, or None.

    Raises:
        InputError: It is no device's name, or this machine has no such device; the message names those that it has.
    """
    if name is None or name == AUTO:
        return name
    there = _there()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        pass_on_memory(error)
        device = None
    named = None if device is None else f"{device.type}:{device.index or 0}"
    if named not in there and (device is None or device.type != "cpu"):
        raise InputError(f"device {name!r}: not on this machine, which has {', '.join(there)}; needed one of these.")
    return name


def one_device(name: str | None, why: str) -> str | None:
    """Check that a device is there and is a single one; None always is.

    Args:
        name: As of :func:`check_device`.
        why: Why it has to be one, for the message.

    Raises:
        InputError: It is not there, or ``auto``.
    """
    if check_device(name) == AUTO:
        raise InputError(f"device 'auto': {why}; name it, such as cuda.")
    return name


def _there() -> list[str]:
    """Names of the devices of this machine."""
    if not torch.accelerator.is_available():
        return ["cpu"]
    kind = torch.accelerator.current_accelerator()
    return ["cpu", *(f"{kind.type if kind else ''}:{index}" for index in range(torch.accelerator.device_count()))]
