"""Machine speeds that contraction paths are chosen by: built in, or measured on this machine when the user asks.

Nothing is ever measured on its own, so importing and the first forward take no time, and two processes with the same
built-in or measured constants choose the same paths. Ranks with different constants, of unlike machines, still compute
the same function: only the rounding of their sums differs, as it does between their processors.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

from tensorfold.algebra.contraction.costs import Machine, default_machine
from tensorfold.algebra.contraction.paths import ContractionPath, Order
from tensorfold.algebra.contraction.search import fastest_path
from tensorfold.algebra.specs.spec import Spec
from tensorfold.errors import InputError
from tensorfold.utils.atomic_files import atomic_directory, cache_directory

# Paths are chosen for numbers of tokens that are powers of two; above this one, time is in proportion to tokens.
_MOST_TOKENS = 4096

# A traced graph with a free number of tokens has one path: the fastest for a long prompt or a training batch.
_SYMBOLIC_TOKENS = 1024


def path_for(
    spec: Spec, tokens: int, training: bool, device: torch.device, dtype: torch.dtype, force: Order | str | None = None
) -> ContractionPath:
    """Fastest contraction path of an operator for a number of vectors on a device.

    Args:
        spec: Shape of the operator.
        tokens: Number of vectors, rounded up to a power of two; it may be symbolic, and then no guard is put on it, so
            that one graph serves every number of tokens.
        training: Whether gradients will be asked for.
        device: Where the cores are.
        dtype: Theirs.
        force: Order of sites or way that is asked for, as in ``contraction.search.fastest_path``.
    """
    return _constant(spec, _bucket(tokens), training, device.type, dtype, force)


@torch.compiler.assume_constant_result
def _constant(
    spec: Spec, tokens: int, training: bool, device_type: str, dtype: torch.dtype, force: Order | str | None
) -> ContractionPath:
    return fastest_path(spec, tokens, training, machine(device_type, dtype, torch.get_num_threads()), force)


def _bucket(tokens: int) -> int:
    """Number of tokens rounded up to a power of two, at most ``_MOST_TOKENS``."""
    if not torch.compiler.is_compiling() and not isinstance(tokens, torch.SymInt):
        return min(1 << max(int(tokens) - 1, 0).bit_length(), _MOST_TOKENS)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    limit = 1
    while limit < _MOST_TOKENS:
        if statically_known_true(tokens <= limit):
            return limit
        limit *= 2
    return limit if statically_known_true(tokens > limit) else _SYMBOLIC_TOKENS


@lru_cache(maxsize=64)
def machine(device_type: str, dtype: torch.dtype, threads: int) -> Machine:
    """Speeds that :func:`calibrate_machine` measured for a device, dtype and number of threads, else the built-in ones.

    Raises:
        InputError: The file with the measured speeds cannot be used.
    """
    default = default_machine(device_type)
    try:
        file = _directory(device_type, dtype, threads) / "machine.json"
        text = file.read_text(encoding="utf-8")
    except (InputError, OSError):
        return default
    try:
        values = json.loads(text)
        names = {field.name for field in fields(Machine)}
        if values.keys() != names or not all(isinstance(v, int | float) and v >= 0 for v in values.values()):
            raise ValueError
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"{file} does not hold the speeds of a machine; remove it, or run calibrate_machine again."
        ) from error
    return Machine(**values)


def calibrate_machine(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Machine:
    """Measure the speeds that paths are chosen by, in about a second, and keep them for later processes.

    Large products, reading, permuted copies and calls are timed, so nothing else should be running. The speeds are
    kept below ``cache_directory("machine")``, by device, number of threads, dtype and version of torch. Under autocast,
    speeds for the dtype of the inputs are used.

    Args:
        device: Device to measure.
        dtype: Dtype to measure.

    Raises:
        InputError: The cache directory cannot be written.
    """
    device = torch.device(device)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def product(rows: int, columns: int, depth: int) -> float:
        x, weight = tensor(rows, depth), tensor(columns, depth)
        return seconds(lambda: F.linear(x, weight))

    with torch.no_grad():
        call = product(8, 8, 8)
        x, matrix, turned = tensor(1, 2048), tensor(2048, 2048), tensor(512, 64, 64)
        measured = replace(
            default_machine(device.type),
            macs=_rate(256 * 512 * 512, product(256, 512, 512) - call),
            numbers=_rate(matrix.numel(), seconds(lambda: F.linear(x, matrix)) - call),
            permuted=_rate(turned.numel(), seconds(lambda: turned.mT.contiguous()) - call),
            call=2 * call,  # views and the choice itself come on top of the kernel
        )
    with atomic_directory(_directory(device.type, dtype, torch.get_num_threads()), replace=True) as directory:
        (directory / "machine.json").write_text(json.dumps(asdict(measured), indent=1) + "\n", encoding="utf-8")
    machine.cache_clear()
    return measured


def seconds(call: Callable[[], Tensor]) -> float:
    """Least seconds of several calls, an accelerator's work included; other work on the machine only adds time."""
    return float(min(Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=0.1).times))


def _rate(count: float, took: float) -> float:
    """Count a second, where ``took`` are seconds."""
    return count / max(took, 1e-9)


def _directory(device_type: str, dtype: torch.dtype, threads: int) -> Path:
    name = torch.cuda.get_device_name() if device_type == "cuda" else f"{platform.node()}-{platform.machine()}"
    key = f"{device_type}-{name}-{threads}-{dtype}-{torch.__version__}"
    return cache_directory("machine") / re.sub(r"[^\w.-]+", "-", key)
