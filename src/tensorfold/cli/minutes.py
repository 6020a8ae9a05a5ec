"""Settings of healing that fit into some minutes on this machine."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorfold.errors import pass_on_memory
from tensorfold.utils.atomic_files import cache_directory, write_file

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_BATCH, _BLOCK = 2, 512
_FEWEST = 10  # steps; fewer would do nothing
_OVERHEAD = 1.3  # evaluations, checkpoints and the optimiser, over the passes that are timed


def heal_options(teacher: PreTrainedModel, folded: Path, minutes: float, key: str) -> dict[str, Any] | None:
    """Options of ``tensorfold heal`` for as many steps as there is time for; None where it is too few to matter.

    One step is timed once for a folded model on a machine and kept in the cache, so that the same command always takes
    the same number of steps.

    Args:
        teacher: The dense model.
        folded: Directory of the folded model.
        minutes: Time for healing.
        key: Identity of the folded model.
    """
    from tensorfold.models.anatomy import context_length

    block = min(_BLOCK, context_length(teacher.config) or _BLOCK)
    steps = int(60 * minutes / (_OVERHEAD * _BATCH * _window_seconds(teacher, folded, block, key)))
    if steps < _FEWEST:
        return None
    steps = min(steps, 2000)
    precision = _precision(teacher.device)
    more = {"kl": 1, "warmup": max(1, steps // 10), "train": "all-but-embeddings", "precision": precision}
    return {"steps": steps, "batch": _BATCH, "block": block, "lr": 1.5e-4, "set": more}


def _precision(device: torch.device) -> str:
    """``bf16`` where the device has instructions for it, else ``fp32``."""
    import torch

    from tensorfold.utils.torch_modes import multiplies_bfloat16

    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and multiplies_bfloat16() else "fp32"


def _window_seconds(teacher: PreTrainedModel, folded: Path, block: int, key: str) -> float:
    """Seconds of training on one window: the student forwards and backwards, the teacher forwards."""
    import torch

    from tensorfold.algebra.precision import autocast
    from tensorfold.benchmark.timing import waiting_for
    from tensorfold.hf.loading import load

    device, precision = teacher.device, _precision(teacher.device)
    place = "" if device.type == "cpu" else f"-{device.type}"
    file = cache_directory("heal-speed") / f"{key[:32]}-{block}-{torch.get_num_threads()}-{precision}{place}.json"
    try:
        return float(json.loads(file.read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError) as error:  # not timed yet
        pass_on_memory(error)
    student: torch.nn.Module = load(folded).to(device)  # type: ignore[arg-type]
    finish = waiting_for(device)
    ids = torch.zeros(1, block, dtype=torch.long, device=device)
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        with autocast(device.type, torch.bfloat16 if precision == "bf16" else None):
            with torch.no_grad():
                teacher(input_ids=ids, use_cache=False)
            loss = student(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        finish()
        taken.append(time.perf_counter() - started)
    seconds = min(taken)
    write_file(file, json.dumps({"seconds": seconds}).encode())
    return seconds
