"""``tensorfold.bench``: speed and memory of a folded model, layer by layer and as a whole, beside its rivals."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tensorfold.benchmark.layers import bench_layer, groups
from tensorfold.benchmark.memory import peak_of_prefill
from tensorfold.benchmark.report import BenchReport, processor
from tensorfold.benchmark.rivals import installed
from tensorfold.benchmark.timing import Clock
from tensorfold.benchmark.whole import bench_models, is_folded, prompt_length, size, ways_kept
from tensorfold.errors import InputError, TensorfoldError
from tensorfold.export.engine_model import EngineModel, EngineSource, find_runnable
from tensorfold.hf.dense import plain_model
from tensorfold.hf.sources import Source
from tensorfold.models.anatomy import count_parameters
from tensorfold.nn import FoldedModule
from tensorfold.recipes.settings import BENCH_NEEDS, BenchSettings
from tensorfold.utils.devices import one_device
from tensorfold.utils.effects import changed, check_effects
from tensorfold.utils.terminal import progress_bar
from tensorfold.utils.validation import check_keys


def bench(
    model: PreTrainedModel | str | Path,
    against: PreTrainedModel | str | Path | None = None,
    *,
    settings: BenchSettings | None = None,
    progress: bool = False,
    clock: Clock = time.perf_counter,
    **overrides: Any,
) -> BenchReport:
    """Measure speed and memory of a model, usually a folded one, in turn with its dense form and rivals.

    Every folded layer is timed at several numbers of tokens, those of equal spec once, against the layer of the same
    name in the dense model, or an ``nn.Linear`` of its shape holding its matrix; against the matrix built in every
    forward; and against tensorly-torch and pyfastkron where these are installed and apply. Whole models are timed
    reading a prompt (into a KV cache, last logits) and generating after it, one sequence. Ratios are of samples taken
    in turn, reported as medians and quartiles.

    Args:
        model: A transformers model, or the name of one (hub id, directory, ``.gguf`` file). It is not changed.
        against: The dense model, likewise; the model itself with its matrices multiplied out if None.
        settings: All settings; the defaults if None.
        progress: Whether a progress bar is shown on standard error.
        clock: Seconds since any moment.
        overrides: Single settings that replace those in ``settings``.

    Raises:
        InputError: Models or settings cannot be used together, or a model cannot be found.
    """
    settings = settings or BenchSettings()
    check_keys("bench", overrides, [field.name for field in dataclasses.fields(BenchSettings)])
    settings = dataclasses.replace(settings, **overrides)
    if against is model and isinstance(model, PreTrainedModel):
        raise InputError("bench: the model is compared with itself; needed the dense model, loaded separately.")
    with _threads(settings.threads):
        place = settings.dtype, one_device(settings.device, "a benchmark compares on one device")
        loaded, source, name = _load(model, *place)
        other, other_source, other_name = (None, None, None) if against is None else _load(against, *place)
        if other is not None:
            _check_alike(loaded, other)
        training = {m: m.training for m in (loaded, other) if m is not None}
        try:
            for each in training:
                each.eval()
            with ways_kept(loaded, settings.way):
                return _bench(loaded, source, name, other, other_source, other_name, settings, progress, clock)
        finally:
            for each, mode in training.items():
                each.train(mode)


def _bench(
    model: PreTrainedModel,
    source: Source | None,
    name: str,
    against: PreTrainedModel | None,
    against_source: Source | None,
    against_name: str | None,
    settings: BenchSettings,
    progress: bool,
    clock: Clock,
) -> BenchReport:
    models, ways = {"model": model}, {}
    if against is not None:
        models["dense"] = against
    elif is_folded(model):
        models["dense"] = plain_model(model)
    if any(isinstance(module, FoldedModule) and module.ways for module in model.modules()):
        models["materialised"] = model
        ways["materialised"] = "materialise"
    prefill = prompt_length(list(models.values()), settings.prefill, settings.decode)
    rivals, notes = installed() if ways else ([], [])
    found = groups(model, against)
    check_effects("bench", changed(settings), found, BENCH_NEEDS)
    bar = progress_bar("bench", progress)
    steps = len(found) * len(settings.tokens) + settings.rounds * len(models)
    task = bar.add_task("", total=steps + (len(models) if settings.memory else 0))

    def advance() -> None:
        bar.advance(task)

    with bar:
        layers = []
        for group in found:
            bar.update(task, description=group.names[0])
            layer, lines = bench_layer(group, settings.tokens, settings.rounds, clock, rivals, settings.memory, advance)
            layers.append(layer)
            notes += lines
        bar.update(task, description="whole model")
        timings = bench_models(models, ways, prefill, settings.decode, settings.rounds, clock, advance)
        if timings[1] is None:
            notes.append("decode: a model gives no KV cache to go on from: left out")
        peaks: dict[str, int] | None = None
        if settings.memory:
            bar.update(task, description="peak memory")
            # In processes of their own, which load the models a second time: one that does not fit is noted.
            peaks = _peaks(list(models), source, against_source, against is None, prefill, settings, notes, advance)
    own = {key: value for key, value in models.items() if key != "materialised"}
    return BenchReport(
        model=name,
        against=against_name,
        machine={
            "machine": processor(),
            "cores": os.cpu_count(),
            "device": str(model.device),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "dtype": _dtype(model),
        },
        settings=settings,
        layers=layers,
        prefill=timings[0],
        decode=timings[1],
        parameters={key: _parameters(value) for key, value in own.items()},
        bytes={key: _bytes(value) for key, value in own.items()},
        peak_bytes=peaks,
        notes=notes,
    )


def _parameters(model: PreTrainedModel) -> int:
    return model.stored_parameters if isinstance(model, EngineModel) else count_parameters(model)


def _bytes(model: PreTrainedModel) -> int:
    return model.stored_bytes if isinstance(model, EngineModel) else size(model)


def _peaks(
    names: list[str],
    source: Source | None,
    against: Source | None,
    own_dense: bool,
    prefill: int,
    settings: BenchSettings,
    notes: list[str],
    advance: Callable[[], None],
) -> dict[str, int] | None:
    """Peak bytes of a prefill in every form of the model; forms that cannot be measured are noted instead.

    Args:
        names: Forms: ``model``, ``dense``, ``materialised``.
        source: Place of the model on the disk; None for a model in memory.
        against: Place of the dense model, likewise.
        own_dense: Whether the dense form is the model itself, multiplied out.
        prefill: Length of the prompt.
        settings: Settings of the benchmark.
        notes: Takes the sentences.
        advance: Called after every form.
    """
    peaks = {}
    for name in names:
        path, form = (source, name) if name != "dense" or own_dense else (against, "model")
        if path is None:
            notes.append(f"peak memory of {name}: measured of models on disk only; give a directory, or its name")
        elif settings.device not in (None, "cpu"):
            notes.append(f"peak memory of {name}: measured on the CPU only; leave out the device")
        elif isinstance(path, EngineSource):
            notes.append(f"peak memory of {name}: not measured of exported graphs")
        else:
            way = settings.way if path is source and form == "model" else None
            try:
                peaks[name], with_loading = peak_of_prefill(
                    path.path, form, tokens=prefill, dtype=settings.dtype, way=way
                )
                if with_loading:
                    notes.append(f"peak memory of {name}: includes loading, which this system cannot leave out")
            except TensorfoldError as error:
                notes.append(str(error))
        advance()
    return peaks or None


def _load(
    model: PreTrainedModel | str | Path, dtype: str | None, device: str | None
) -> tuple[PreTrainedModel, Source | None, str]:
    """Load a model, unless it is one already; return it, its place on the disk if it has one, and its name.

    Raises:
        InputError: It cannot be found, or is in another dtype or on another device than asked for.
    """
    if isinstance(model, str | Path):
        source = find_runnable(str(model))
        return source.model(dtype, device), source, source.name
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"bench: got {type(model).__name__}; needed a transformers model, or the name of one.")
    if dtype is not None and _dtype(model) != dtype:
        raise InputError(f"bench: dtype={dtype}, and the model is in {_dtype(model)}; convert it with .to first.")
    if device is not None and torch.device(device).type != model.device.type:
        raise InputError(f"bench: device={device}, and the model is on {model.device}; move it with .to first.")
    return model, None, model.name_or_path or type(model).__name__


def _check_alike(model: PreTrainedModel, against: PreTrainedModel) -> None:
    """Check that two models have one dtype and device, so that their times differ by folding alone.

    Raises:
        InputError: They have not.
    """
    for what, own, other in (
        ("dtype", *(str(each.dtype).removeprefix("torch.") for each in (model, against))),
        ("device", str(model.device), str(against.device)),
    ):
        if own != other:
            raise InputError(
                f"bench: the model has {what} {own}, what it is compared with has {other}; needed the same. "
                + ("Give --dtype." if what == "dtype" else "Move one of them.")
            )


def _dtype(model: PreTrainedModel) -> str:
    if isinstance(model, EngineModel):
        return model.stored_type
    return str(model.dtype).removeprefix("torch.")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Set the number of torch's threads while the context is open; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
