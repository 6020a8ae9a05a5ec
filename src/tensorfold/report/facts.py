"""What a model's directory says about itself. Files that others may have written are read with suspicion."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tensorfold.algebra.specs.structure import Structure
from tensorfold.algebra.spectrum import bond_spectra
from tensorfold.errors import InputError, TensorfoldError, pass_on_memory, reason
from tensorfold.hf.loading import folded_skeleton, folding_of, load_config
from tensorfold.hf.model_card import source_line
from tensorfold.models.anatomy import count_parameters, empty_model
from tensorfold.models.sizes import stored_bytes
from tensorfold.utils.atomic_files import check_path
from tensorfold.utils.records import BENCH, CARD, EVALUATIONS, HEAL_LOG, read_lines, read_object

T = TypeVar("T")


@dataclass(frozen=True)
class Evaluated:
    """One recorded evaluation; ``parameters`` are those the model had then, ``held_out`` unless it knew the text."""

    perplexity: float
    protocol: str
    text: str
    tokens: int
    parameters: int
    accuracy: float | None
    where: str
    held_out: bool

    @property
    def judge(self) -> tuple[str, str, int]:
        """What has to be equal for two perplexities to be compared: protocol, text and number of tokens."""
        return self.protocol, self.text, self.tokens


@dataclass(frozen=True)
class Folded:
    """A folded module: its spec, its spectra by bond, and what the card has of it: its error and its bytes then."""

    spec: Structure
    error: float | None
    metric: str | None
    spectra: tuple[Tensor, ...] = ()
    bytes: int | None = None


@dataclass(frozen=True)
class Chosen:
    """What a search gave a layer, and its error at other sizes: pairs of parameters and error."""

    parameters: float
    curve: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class ModelFacts:
    """All that the page shows of one directory; ``notes`` say what is missing or could not be read."""

    label: str
    path: Path
    base: str | None
    recipe: str | None
    calibration: str | None
    parameters: int
    parameters_before: int
    weight_bytes: int
    bytes_before: int
    modules: dict[str, Folded]
    evaluations: tuple[Evaluated, ...]
    healed: dict[str, Any] | None
    heal_log: tuple[dict[str, Any], ...]
    bench: dict[str, Any] | None
    choices: dict[str, Chosen] = field(default_factory=dict)
    notes: tuple[str, ...] = field(default=())

    @property
    def is_folded(self) -> bool:
        return bool(self.modules)


def read_directory(path: Path, label: str, step: Callable[[str], None] = lambda _: None) -> ModelFacts:
    """Everything a directory holds but its weights' values, and the spectra of its folded modules.

    Args:
        path: What ``save_pretrained``, ``tensorfold fold`` or ``tensorfold heal`` wrote.
        label: Name on the page.
        step: Called with what is being worked on.

    Raises:
        InputError: It is not a model's directory, or its configuration or weights cannot be read.
    """
    check_directory(path)
    step(label)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise InputError(f"{path}: holds no .safetensors weights; needed a directory written by save_pretrained.")
    config = load_config(path)
    notes: list[str] = []
    try:
        model = folded_skeleton(config)
        folding = folding_of(config)
        # In the model's order, not the alphabetical one of config.json.
        specs = (
            {name: folding.specs[name] for name, _ in model.named_modules() if name in folding.specs} if folding else {}
        )
        parameters = count_parameters(model)
        unfolded = model if folding is None else empty_model(config)
        dense, dense_bytes = count_parameters(unfolded), stored_bytes(unfolded)
        spectra = _spectra(files, specs, set(folding.int8) if folding else set(), step)
    except TensorfoldError as error:
        raise InputError(f"{path}: {error}") from error
    except (SafetensorError, OSError) as error:
        pass_on_memory(error)
        raise InputError(f"{path}: its weights cannot be read ({reason(error)}); copy the checkpoint again.") from error
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        pass_on_memory(error)
        raise InputError(f"{path}: its configuration cannot be used ({reason(error)}).") from error
    card = _optional(lambda: read_object(path / CARD), notes) or {}
    known = card.get("modules")
    details: Mapping[str, Any] = known if isinstance(known, Mapping) else {}
    if specs and not details:
        notes.append(f"{CARD} lists no modules, so the errors of folding are not known; tensorfold fold writes it.")
    modules = {name: _folded(spec, details.get(name), spectra.get(name, ())) for name, spec in specs.items()}
    healed = card.get("heal")
    before, bytes_before = (whole_number(card.get(f"{what}_before")) for what in ("parameters", "bytes"))
    return ModelFacts(
        label=label,
        path=path,
        base=_base(card),
        recipe=_text(card.get("recipe")),
        calibration=_text(card.get("calibration")),
        parameters=parameters,
        parameters_before=dense if before is None else before,
        weight_bytes=sum(file.stat().st_size for file in files),
        bytes_before=dense_bytes if bytes_before is None else bytes_before,
        modules=modules,
        evaluations=_evaluations(path, parameters, notes),
        healed=dict(healed) if isinstance(healed, Mapping) else None,
        heal_log=_log(path / HEAL_LOG, notes),
        bench=_optional(lambda: read_object(path / BENCH), notes),
        choices=_choices(card.get("choices")),
        notes=tuple(notes),
    )


def check_directory(path: Path) -> None:
    """Raise :class:`InputError` unless a path is the directory of a model."""
    check_path(path)
    if not path.is_dir():
        found = "is a file" if path.exists() else "no such directory"
        raise InputError(f"{path}: {found}; needed a model's directory, as tensorfold fold writes it.")
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: has no config.json; needed a model's directory, as tensorfold fold writes it.")


def labels(paths: Sequence[Path]) -> list[str]:
    """The directories' names, or all of the paths where two names are equal.

    Raises:
        InputError: A directory is given twice.
    """
    whole = [path.resolve() for path in paths]
    for path in paths:
        if whole.count(path.resolve()) > 1:
            raise InputError(f"report: {path} is given twice; needed every directory once.")
    names = [path.name or str(path) for path in whole]
    return names if len(set(names)) == len(names) else [str(path) for path in whole]


def place(name: str) -> tuple[int | None, str]:
    """Block of a module and its name there; (None, the whole name) outside the blocks.

    >>> place("model.layers.3.mlp.up_proj"), place("lm_head")
    ((3, 'mlp.up_proj'), (None, 'lm_head'))
    """
    found = re.fullmatch(r".*?\.(\d{1,6})\.(.+)", name)
    return (int(found[1]), found[2]) if found else (None, name)


def number(value: Any) -> float | None:
    """A finite number, or None for anything else a file may hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def whole_number(value: Any) -> int | None:
    """A count, or None for anything else a file may hold."""
    return value if type(value) is int and 0 <= value < 2**63 else None


def _base(card: Mapping[str, Any]) -> str | None:
    """Base model, and what its weights were stored as if that is less than they are now."""
    base, source = _text(card.get("base_model")), card.get("source")
    return f"{base}: {source_line(source)}" if base and isinstance(source, Mapping) else base


def _text(value: Any) -> str | None:
    return value[:1000] if isinstance(value, str) and value else None


def _folded(spec: Structure, details: Any, spectra: tuple[Tensor, ...]) -> Folded:
    details = details if isinstance(details, Mapping) else {}
    error, size = number(details.get("error")), whole_number(details.get("bytes"))
    return Folded(spec, error, _text(details.get("metric")), spectra, size)


def _choices(stored: Any) -> dict[str, Chosen]:
    """Those of a card that can be drawn; a card may have been edited by hand."""
    found = {}
    for name, choice in stored.items() if isinstance(stored, Mapping) else ():
        points = choice.get("curve") if isinstance(choice, Mapping) else None
        size = number(choice.get("parameters")) if isinstance(choice, Mapping) else None
        pairs = [p for p in points if isinstance(p, list) and len(p) == 2] if isinstance(points, list) else []
        curve = [(x, y) for x, y in ((number(a), number(b)) for a, b in pairs) if x is not None and y is not None]
        if size is not None and curve:
            found[str(name)] = Chosen(size, tuple(curve))
    return found


def _spectra(
    files: Sequence[Path], specs: Mapping[str, Structure], int8: Container[str], step: Callable[[str], None]
) -> dict[str, tuple[Tensor, ...]]:
    """Spectra of the folded modules that are one chain of cores; ``int8`` names those that hold codes."""
    holders = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            holders.update(dict.fromkeys(tensors.keys(), file))
    found = {}
    for name, spec in specs.items():
        if not spec.is_chain:
            continue
        step(f"spectra of {name}")
        values = partial(_values, holders, name, name in int8)
        cores = [values(f"cores.{k}", shape) for k, shape in enumerate(spec.stored_shapes)]
        scalars = values("scalars", (spec.scalar_count,)) if spec.scalar_count else None
        found[name] = tuple(bond_spectra(spec.complete(cores, scalars)))
    return found


def _values(holders: Mapping[str, Path], module: str, int8: bool, name: str, shape: tuple[int, ...]) -> Tensor:
    """A parameter of a folded module; where the module is in int8, turned back."""
    if not int8:
        return _tensor(holders, f"{module}.{name}", shape)
    key = name.replace(".", "_")
    codes = f"{module}.codes.{key}"
    if codes not in holders:
        return _tensor(holders, f"{module}.others.{key}", shape)
    scales = _tensor(holders, f"{module}.scales.{key}", (*shape[:2], *(1 for _ in shape[2:])))
    return _tensor(holders, codes, shape, torch.int8) * scales


def _tensor(holders: Mapping[str, Path], name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """A stored tensor, in float64; one of any floating-point type if ``dtype`` is None."""
    if name not in holders:
        raise InputError(f"the checkpoint lacks the tensor {name}; it is incomplete or not of this model.")
    with safe_open(holders[name], framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(name)
    if tuple(tensor.shape) != shape or not (tensor.dtype == dtype if dtype else tensor.is_floating_point()):
        needed = str(dtype).removeprefix("torch.") if dtype else "floating point"
        raise InputError(f"{name} has the shape {tuple(tensor.shape)}, needed {shape} in {needed}.")
    if not torch.isfinite(tensor).all():
        raise InputError(f"{name} holds NaN or infinity; repair the checkpoint.")
    return tensor.double()


def _evaluations(path: Path, parameters: int, notes: list[str]) -> tuple[Evaluated, ...]:
    """The last of the recorded evaluations for every protocol, text and number of tokens."""
    lines, broken = _optional(lambda: read_lines(path / EVALUATIONS), notes) or ([], 0)
    latest: dict[tuple[str, str, int], Evaluated] = {}
    for line in lines:
        if line.get("perplexity") is None and isinstance(line.get("results"), Mapping):
            continue  # tasks of lm-eval without a perplexity
        evaluated = _evaluated(line)
        if evaluated is None:
            broken += 1
            continue
        latest.pop(evaluated.judge, None)
        latest[evaluated.judge] = evaluated
    if broken:
        notes.append(f"{EVALUATIONS}: {broken} lines are no evaluations and were passed over.")
    if any(each.parameters != parameters for each in latest.values()):
        notes.append(f"{EVALUATIONS}: not all of it was measured on as many parameters as there are now.")
    return tuple(latest.values())


def _evaluated(line: Mapping[str, Any]) -> Evaluated | None:
    perplexity, tokens = number(line.get("perplexity")), whole_number(line.get("tokens"))
    protocol, text = _text(line.get("protocol")), _text(line.get("text"))
    parameters = whole_number(line.get("parameters"))
    if perplexity is None or perplexity <= 0 or tokens is None or parameters is None or not (protocol and text):
        return None
    prefix = line.get("prefix")
    if isinstance(prefix, list) and prefix:  # other numbers than from windows without
        protocol += f", windows begin with token {' '.join(map(str, prefix))}"
    where = ", ".join(value for value in (_text(line.get("dtype")), _text(line.get("device"))) if value)
    accuracy = number(line.get("accuracy"))
    return Evaluated(perplexity, protocol, text, tokens, parameters, accuracy, where, not line.get("seen"))


def _log(file: Path, notes: list[str]) -> tuple[dict[str, Any], ...]:
    lines, broken = _optional(lambda: read_lines(file), notes) or ([], 0)
    if broken:
        notes.append(f"{file.name}: {broken} lines are no JSON objects and were passed over.")
    return tuple(lines)


def _optional(read: Callable[[], T], notes: list[str]) -> T | None:
    """What ``read`` gives; a file that cannot be read costs a note, not the report."""
    try:
        return read()
    except InputError as error:
        notes.append(f"{error}; left out.")
        return None
