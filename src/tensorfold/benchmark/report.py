"""Result of a benchmark: as tables, and as one JSON object."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from tensorfold.benchmark.layers import Layer
from tensorfold.benchmark.timing import Timing
from tensorfold.recipes.settings import BenchSettings
from tensorfold.utils.terminal import render

_HEADINGS = {"prefill": "reading a prompt", "decode": "generating, one token at a time"}


@dataclass(frozen=True)
class BenchReport:
    """Result of :func:`tensorfold.bench`.

    Args:
        model: Name of the model that was measured.
        against: Name of the dense model; None where it is the model itself, multiplied out.
        machine: ``machine`` (the processor), ``cores``, ``device``, ``torch``, ``threads``, ``dtype``.
        settings: Settings of the benchmark.
        layers: Folded layers, those of equal spec together; empty if nothing is folded.
        prefill: Times of whole models reading a prompt as ``generate`` does; batch size 1.
        decode: Times of generating after it with the KV cache, one token at a time; None without such a cache.
        parameters: Number of parameters of the whole models by name, shared ones once.
        bytes: Bytes of their parameters and buffers, by name.
        peak_bytes: Peak bytes of a prefill in a process of its own, by name (see :func:`memory.peak_of_prefill`); None
            if not measured.
        notes: Sentences about rivals, their versions, and everything that was left out.
    """

    model: str
    against: str | None
    machine: Mapping[str, Any]
    settings: BenchSettings
    layers: list[Layer]
    prefill: Timing
    decode: Timing | None
    parameters: dict[str, int]
    bytes: dict[str, int]
    peak_bytes: dict[str, int] | None
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON form; seconds, bytes, and multiply–adds a token."""
        return {
            "model": self.model,
            "against": self.against,
            **self.machine,
            "rounds": self.settings.rounds,
            "way": self.settings.way,
            "layers": [layer.to_dict() for layer in self.layers],
            "prefill": self.prefill.to_dict(),
            "decode": None if self.decode is None else self.decode.to_dict(),
            "parameters": self.parameters,
            "bytes": self.bytes,
            "peak_bytes": self.peak_bytes,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        machine = self.machine
        dense = self.against or "its own matrices, multiplied out once"
        head = [
            f"{self.model} against {dense}" if len(self.parameters) > 1 else f"{self.model}, which is not folded",
            f"{machine['machine']}, {machine['threads']} of {machine['cores']} threads, {machine['device']}, "
            f"{machine['dtype']}, torch {machine['torch']}; medians (quartiles) of {self.settings.rounds} rounds",
        ]
        parts = ["\n".join(head), self._whole(), self._memory()]
        if self.layers:
            parts += [self._sizes(), self._layers()]
        return "\n\n".join([*parts, "\n".join(f"note: {note}" for note in self.notes)]).rstrip()

    def _whole(self) -> str:
        table = Table(box=None, pad_edge=False)
        names = list(self.prefill.samples)
        for heading in ("whole model", "tokens", *(f"{name}, tokens/s" for name in names)):
            table.add_column(heading, justify="left" if heading == "whole model" else "right")
        for name in names[1:]:
            table.add_column(f"× {name}", justify="right")
        table.add_column("multiply–adds", justify="right")
        for kind, timing in (("prefill", self.prefill), ("decode", self.decode)):
            if timing is not None:
                speeds, speedups = timing.tokens_per_second, timing.speedup
                row = [_HEADINGS[kind], f"{timing.tokens:,}", *(_speed(speeds[name]) for name in names)]
                table.add_row(*row, *(str(speedups[name]) for name in names[1:]), _macs(timing))
        return render(table)

    def _memory(self) -> str:
        table = Table(box=None, pad_edge=False)
        table.add_column("memory")
        for heading in ("parameters", "MB", "peak MB of a prefill"):
            table.add_column(heading, justify="right")
        for name in self.prefill.samples:
            peak = (self.peak_bytes or {}).get(name)
            # The materialised form has the parameters of the model itself.
            owner = name if name in self.parameters else "model"
            cells = (f"{self.parameters[owner]:,}", _megabytes(self.bytes[owner]))
            table.add_row(name, *cells, "" if peak is None else _megabytes(peak))
        return render(table)

    def _sizes(self) -> str:
        table = Table(box=None, pad_edge=False)
        for heading in ("layer", "spec", "dense layer"):
            table.add_column(heading)
        for heading in ("count", "MB each", "of dense"):
            table.add_column(heading, justify="right")
        for layer in self.layers:
            share = layer.bytes["model"] / layer.bytes["dense"]
            cells = (str(len(layer.names)), _megabytes(layer.bytes["model"]), f"{share:.1%}")
            table.add_row(label(layer), str(layer.spec), layer.dense, *cells)
        return render(table)

    def _layers(self) -> str:
        rivals = list(dict.fromkeys(name for layer in self.layers for p in layer.points for name in p.timing.speedup))
        table = Table(box=None, pad_edge=False)
        table.add_column("layer")
        table.add_column("tokens", justify="right")
        table.add_column("way")
        for heading in ("tokens/s", *(f"× {name}" for name in rivals), "multiply–adds", "MB a forward"):
            table.add_column(heading, justify="right")
        for layer in self.layers:
            for number, point in enumerate(layer.points):
                timing, speedups = point.timing, point.timing.speedup
                table.add_row(
                    "" if number else short_label(layer),
                    f"{timing.tokens:,}",
                    point.way,
                    _speed(timing.tokens_per_second["model"]),
                    *(str(speedups.get(name, "")) for name in rivals),
                    _macs(timing),
                    _megabytes(point.peak_bytes["model"]) if point.peak_bytes else "",
                )
        return render(table)


def label(layer: Layer) -> str:
    """Names of layers, the numbers of their blocks replaced by ``*``."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in layer.names))


def short_label(layer: Layer) -> str:
    """Last two parts of layers' names, which tell the layers of a block apart."""
    return ", ".join(dict.fromkeys(".".join(name.split(".")[-2:]) for name in label(layer).split(", ")))


def _macs(timing: Timing) -> str:
    """Text of the model's multiply–adds a token, with their share of the dense model's."""
    own, dense = timing.macs["model"], timing.macs.get("dense")
    return f"{own:,.0f}" + (f" ({own / dense:.1%})" if dense else "")


def _speed(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f}" if count >= 1e5 else f"{count / 1e6:.4f}"


def processor() -> str:
    """Name of the processor, as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
