"""Peak memory of a layer's forward, by the allocator's events, and of a model's prefill, in a process of its own.

``python -m tensorfold.benchmark.memory '{"path": …}'`` is that process; it prints one JSON object.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import tensorfold
from tensorfold.errors import TensorfoldError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMS = ("model", "dense", "materialised")


def peak_of_call(call: Callable[[], object], device: torch.device) -> int | None:
    """Most bytes that torch allocates at once during a call, outputs included, beyond those allocated before it.

    Memory that libraries take without torch's allocator, such as a matrix product's packed panels, is not seen.

    Args:
        call: The call to measure.
        device: Device that it computes on.

    Returns:
        Bytes; None on accelerators other than CUDA.
    """
    if device.type == "cuda":
        call()  # libraries' work spaces, which stay
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events: Any = profiler.profiler
    events = [event for event in events.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):  # stable: allocations of one moment keep order
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def peak_of_prefill(
    path: str, form: str, *, tokens: int, dtype: str | None = None, way: str | None = None
) -> tuple[int, bool]:
    """Measure the bytes that a model needs to read a prompt, in a process of its own.

    The number is the largest resident set while the prompt is read as ``generate`` reads it, weights and KV cache
    included, less the resident set before the model was loaded, with all code imported. Loading itself is not part of
    it on Linux, where the peak can be reset; elsewhere it is.

    Args:
        path: Directory or hub id.
        form: ``model``, as it is; ``dense``, its folded matrices multiplied out once; ``materialised``, its matrices
            multiplied out in every forward.
        tokens: Length of the prompt.
        dtype: Dtype of the weights; as stored if None.
        way: Way of every folded layer that can choose; their own if None.

    Returns:
        Bytes, and whether loading is among them.

    Raises:
        TensorfoldError: The process failed; the message is its last line.
    """
    task = {"path": path, "form": form, "tokens": tokens, "dtype": dtype, "way": way}
    task["threads"] = torch.get_num_threads()
    packages = str(Path(tensorfold.__file__).parent.parent)
    known = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": packages + (os.pathsep + known if known else "")}
    command = [sys.executable, "-m", "tensorfold.benchmark.memory", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise TensorfoldError(f"peak memory of {form}: the process that measures it failed: {last[:300]}")
    result = json.loads(done.stdout.splitlines()[-1])
    return int(result["peak_bytes"]), bool(result["with_loading"])


def _measure(path: str, form: str, tokens: int, dtype: str | None, way: str | None) -> dict[str, Any]:
    """Peak bytes of a prefill in this process, and whether loading is among them; see :func:`peak_of_prefill`."""
    from tensorfold.benchmark.whole import last_only, prompt, set_ways
    from tensorfold.hf.loading import load, load_config
    from tensorfold.models.anatomy import empty_model

    empty_model(load_config(path))  # imports the architecture's code
    matrix = torch.ones(256, 256)
    matrix @ matrix  # threads and buffers of the matrix product
    gc.collect()
    before = _resident("VmRSS")
    model = load(path, dtype=dtype).eval()
    set_ways(model, "materialise" if form == "materialised" else way)
    if form == "dense":
        model = _dense(model)
    gc.collect()
    resettable = _forget_peak()
    with torch.inference_mode():
        model(input_ids=prompt([model], tokens), use_cache=True, **last_only(model))
    return {"peak_bytes": max(_resident("VmHWM") - before, 0), "with_loading": not resettable}


def _dense(model: PreTrainedModel) -> PreTrainedModel:
    """Multiply out a folded model, without leaving anything of it in memory."""
    from tensorfold.hf.dense import plain_model

    plain = plain_model(model)
    for parameter in plain.parameters():
        # Tensors that were not folded still lie in the mapped file, and would keep the cores' pages beside them.
        parameter.data = parameter.data.clone()
    return plain


def _resident(key: str) -> int:
    """Resident bytes of this process now (``VmRSS``) or at their peak (``VmHWM``); without ``/proc``, the peak."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(key)) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _forget_peak() -> bool:
    """Give freed memory back to the system and reset the peak; False where the system cannot reset it."""
    if sys.platform != "linux":
        return False
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def main(argument: str) -> None:
    """Measure the prefill that a JSON object describes, and print the result as a JSON object."""
    task = json.loads(argument)
    torch.set_num_threads(task.pop("threads"))
    print(json.dumps(_measure(**task)))


if __name__ == "__main__":
    main(sys.argv[1])
