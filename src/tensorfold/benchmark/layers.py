"""Single folded layers: timed at several numbers of tokens, in turn with their dense layers and rivals."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensorfold.algebra.specs.structure import Structure
from tensorfold.benchmark.memory import peak_of_call
from tensorfold.benchmark.rivals import Rival, competitor
from tensorfold.benchmark.timing import Clock, Timing, interleave, waiting_for
from tensorfold.benchmark.whole import macs, size
from tensorfold.models.anatomy import dense_weight, is_plain_linear
from tensorfold.nn import FoldedModule, FoldedTable, StructuredLinear

# Most outputs of a forward that is timed: 1 GB in float32, of which several are held.
_MOST_OUTPUTS = 2**28


@dataclass(frozen=True)
class Point:
    """Measurements of a layer at one number of tokens.

    Args:
        way: Way in which the layer is applied: its order of sites, ``materialise``, ``held matrix``, or ``own`` where a
            kind of layer has one way only.
        timing: Seconds of one forward.
        peak_bytes: Most bytes that a forward allocates at once, outputs included (see :func:`memory.peak_of_call`), of
            the layer and its rivals by name; None if not measured.
    """

    way: str
    timing: Timing
    peak_bytes: dict[str, int] | None

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"way": self.way, **self.timing.to_dict(), "peak_bytes": self.peak_bytes}


@dataclass(frozen=True)
class Layer:
    """Measurements of the layers of one spec, of which one was timed.

    Args:
        names: Full names of all such layers; the first was timed.
        kind: Their class.
        spec: Their structure.
        bias: Whether they have a bias.
        dense: Kind of the dense layer that the timed one was compared with, in words.
        bytes: Bytes of the parameters and buffers of one layer, by ``model`` and ``dense``.
        points: Measurements, by number of tokens in the order asked for.
    """

    names: list[str]
    kind: str
    spec: Structure
    bias: bool
    dense: str
    bytes: dict[str, int]
    points: list[Point]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "names": self.names,
            "count": len(self.names),
            "kind": self.kind,
            "spec": str(self.spec),
            **self.spec.to_dict(),
            "bias": self.bias,
            "parameters": self.spec.parameters,
            "dense": self.dense,
            "bytes": self.bytes,
            "tokens": [point.to_dict() for point in self.points],
        }


@dataclass(frozen=True)
class Group:
    """Layers of one kind and spec, which take equally long.

    Attributes:
        names: Full names.
        module: First of them.
        beside: Module of the dense model in its place, if there is one.
    """

    names: list[str]
    module: FoldedModule
    beside: nn.Module | None


def groups(model: nn.Module, against: nn.Module | None) -> list[Group]:
    """Group a model's folded layers, so that those that take equally long are timed once.

    Args:
        model: Model with folded layers.
        against: Dense model that it is compared with; None for the model itself, multiplied out.
    """
    found: dict[object, Group] = {}
    for name, module in model.named_modules():
        if not isinstance(module, FoldedModule):
            continue
        beside = None if against is None else _beside(name, module, against)
        place = (type(beside), _spec(beside) if isinstance(beside, FoldedModule) else None)
        key = (type(module), _spec(module), _bias(module) is None, module.cores[0].dtype, place)
        found.setdefault(key, Group([], module, beside)).names.append(name)
    return list(found.values())


def _bias(module: nn.Module) -> Tensor | None:
    return getattr(module, "bias", None)


def _beside(name: str, module: FoldedModule, against: nn.Module) -> nn.Module | None:
    """Module of a name in the dense model, if it is of the kind and shape of the folded one."""
    try:
        other = against.get_submodule(name)
    except AttributeError:
        return None
    table = isinstance(module, FoldedTable)
    if isinstance(other, FoldedModule):
        return other if _shape(other) == _shape(module) and isinstance(other, FoldedTable) == table else None
    if not (isinstance(other, nn.Embedding) if table else is_plain_linear(other)):
        return None
    return other if tuple(dense_weight(other).shape) == _shape(module) else None


def _shape(module: FoldedModule) -> tuple[int, int]:
    """Shape (out, in) of a folded module's matrix; for a table (vocabulary, width)."""
    spec = _spec(module)
    return (spec.out_features, spec.in_features)


def _spec(module: FoldedModule) -> Structure:
    spec: Any = module.spec
    return spec  # type: ignore[no-any-return]


@torch.no_grad()
def _dense(module: FoldedModule) -> nn.Module:
    """Plain layer with the matrix of a folded one, multiplied out."""
    rows, columns = _shape(module)
    if isinstance(module, FoldedTable):
        table = nn.Embedding(rows, columns, device="meta")
        table.weight = nn.Parameter(module.to_dense() * module.scale)
        return table
    bias = _bias(module)
    linear = nn.Linear(columns, rows, bias is not None, device="meta")
    linear.weight = nn.Parameter(module.to_dense())
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach()))
    return linear


def _inputs(module: FoldedModule, tokens: int) -> Tensor:
    """Inputs for a layer, equal at every call: token ids (tokens,) for a table, else hidden states (tokens, in)."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = _shape(module)
    core = module.cores[0]
    if isinstance(module, FoldedTable):
        return torch.randint(rows, (tokens,), generator=generator).to(core.device)
    return torch.randn(tokens, columns, generator=generator).to(core.device, core.dtype)


@torch.inference_mode()
def bench_layer(
    group: Group,
    tokens: Sequence[int],
    rounds: int,
    clock: Clock,
    rivals: Sequence[Rival],
    memory: bool,
    advance: Callable[[], None],
) -> tuple[Layer, list[str]]:
    """Time one layer of a group.

    Args:
        group: Layers of one kind and spec.
        tokens: Numbers of tokens.
        rounds: Samples of every timing.
        clock: Seconds since any moment.
        rivals: Libraries that are timed as well, where they apply.
        memory: Whether peak memory is measured.
        advance: Called after every number of tokens.

    Returns:
        The measurements, and lines about rivals and numbers of tokens that were left out, with the reason.
    """
    module, name = group.module, group.names[0]
    dense = _dense(module) if group.beside is None else group.beside
    calls: dict[str, Callable[[Tensor], Any]] = {"model": module, "dense": dense}
    notes: list[str] = []
    built = None
    if module.ways:
        built = copy.copy(module)  # over the same parameters
        built.way = "materialise"
        calls["materialised"] = built
        for rival in rivals:
            if not (isinstance(module, StructuredLinear) and module.spec.is_chain):
                continue
            found = competitor(rival, module, _inputs(module, 3))
            if isinstance(found, str):
                notes.append(f"{rival.name} {found}: left out for {name} ({module.spec})")
            else:
                calls[rival.name] = found
    points = []
    for count in tokens:
        if count * _shape(module)[0] > _MOST_OUTPUTS and not isinstance(module, FoldedTable):
            notes.append(f"{name} at {count} tokens has {count * _shape(module)[0]:,} outputs: left out")
        else:
            points.append(_point(module, dense, built, calls, count, rounds, clock, memory))
        advance()
    label = "nn.Embedding" if isinstance(module, FoldedTable) else "nn.Linear"
    if group.beside is not None:
        label = f"{type(group.beside).__name__} of the dense model"
    bytes_ = {"model": size(module), "dense": size(dense)}
    has_bias = _bias(module) is not None
    return Layer(group.names, type(module).__name__, _spec(module), has_bias, label, bytes_, points), notes


def _point(
    module: FoldedModule,
    dense: nn.Module,
    built: FoldedModule | None,
    calls: dict[str, Callable[[Tensor], Any]],
    tokens: int,
    rounds: int,
    clock: Clock,
    memory: bool,
) -> Point:
    x = _inputs(module, tokens)
    device = module.cores[0].device
    bound = {name: _bind(call, x) for name, call in calls.items()}
    samples = interleave(bound, rounds, clock, waiting_for(device))
    counted = {"model": macs(module, tokens), "dense": macs(dense, tokens)}
    if built is not None:
        counted["materialised"] = macs(built, tokens)
    peaks = {name: peak_of_call(call, device) for name, call in bound.items()} if memory else {}
    return Point(
        module.way_taken(tokens),
        Timing(tokens, samples, counted),
        {name: peak for name, peak in peaks.items() if peak is not None} or None,
    )


def _bind(call: Callable[[Tensor], Any], x: Tensor) -> Callable[[], Any]:
    return lambda: call(x)
