"""Facts about a model, read from its directory. Files that others may have written are checked value by value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from torch import Tensor

from tensorfold.algebra.specs.registry import check_size, spec_from_dict
from tensorfold.algebra.specs.structure import Structure
from tensorfold.errors import InputError, TensorfoldError, pass_on_memory, reason
from tensorfold.hf.loading import folded_skeleton, folding_of, load_config
from tensorfold.hf.model_card import source_line
from tensorfold.models.anatomy import count_parameters, empty_model
from tensorfold.models.sizes import stored_bytes
from tensorfold.report.spectra import read_spectra
from tensorfold.utils.atomic_files import check_path
from tensorfold.utils.records import BENCH, CARD, EVALUATIONS, HEAL_LOG, read_lines, read_object

T = TypeVar("T")


@dataclass(frozen=True)
class Evaluated:
    """One recorded evaluation of a model.

    Attributes:
        perplexity: On the text, by the protocol.
        protocol: Name of the protocol, with the prefix of windows if there is one.
        tokens: Number of predicted tokens.
        parameters: Parameters that the model had when it was evaluated.
        accuracy: Share of tokens predicted right, 0 to 1, if recorded.
        where: Dtype and device of the computation.
        held_out: False if the text was used in calibration, selection or training.
    """

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
        """Protocol, text and number of tokens, which have to be equal for two perplexities to be compared."""
        return self.protocol, self.text, self.tokens


@dataclass(frozen=True)
class Folded:
    """A folded module.

    Attributes:
        spec: Its structure.
        error: Relative error of the fit, by the card, if known.
        metric: Weighting of the error, by the card: ``weight`` for none, ``activation``, ``loss`` or ``text``.
        spectra: Singular values at every bond, largest first; empty where the cores are no chain.
        bytes: Stored bytes when it was folded, by the card, if known.
    """

    spec: Structure
    error: float | None
    metric: str | None
    spectra: tuple[Tensor, ...] = ()
    bytes: int | None = None


@dataclass(frozen=True)
class Chosen:
    """Size that a search gave a layer, and its error at other sizes.

    Attributes:
        parameters: The size.
        curve: Pairs of parameters and error.
        rivals: Errors of other structures that were priced at this size, by structure.
        dense: Whether it stays as it is.
    """

    parameters: float
    curve: tuple[tuple[float, float], ...]
    rivals: dict[str, float] = field(default_factory=dict)
    dense: bool = False

    @property
    def predicted(self) -> float | None:
        """Error at the size that was given; None where the curve lacks it."""
        return next((error for size, error in self.curve if size == self.parameters), None)


@dataclass(frozen=True)
class ModelFacts:
    """Facts about one directory that the page shows.

    Attributes:
        label: Name on the page.
        base: Base model, and the quantised file that it was read from, if any.
        parameters: Number of parameters, shared ones once; ``parameters_before``, before it was folded.
        weight_bytes: Bytes of its weight files; ``bytes_before``, of all that was stored before it was folded.
        modules: Folded modules by full name, in the model's order; of a plain model with fewer hidden units, the layers
            that lost some, by the card.
        evaluations: Recorded evaluations, the last one by every judge.
        healed: The card's facts about healing, if it was healed; ``heal_log``, its records, oldest first.
        bench: Record of ``tensorfold bench``, if there is one.
        choices: Sizes that a search gave, by layer.
        notes: Sentences about files that are missing or could not be read.
    """

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
        """Whether any module is folded."""
        return bool(self.modules)


def read_directory(path: Path, label: str, step: Callable[[str], None] = lambda _: None) -> ModelFacts:
    """Read the facts about a model from its directory, and compute the spectra of its folded modules.

    Args:
        path: Directory that ``save_pretrained``, ``tensorfold fold`` or ``tensorfold heal`` wrote.
        label: Name on the page.
        step: Called with the name of each thing that is worked on.

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
        spectra = read_spectra(files, specs, set(folding.int8) if folding else set(), step)
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
    if not specs and parameters == whole_number(card.get("parameters_after")):
        specs = _narrowed(details)
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
    """Check that a path is a model's directory.

    Raises:
        InputError: It is a file, is not there, or has no config.json.
    """
    check_path(path)
    if not path.is_dir():
        found = "is a file" if path.exists() else "no such directory"
        raise InputError(f"{path}: {found}; needed a model's directory, as tensorfold fold writes it.")
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: has no config.json; needed a model's directory, as tensorfold fold writes it.")


def labels(paths: Sequence[Path]) -> list[str]:
    """Labels for directories: their names, or whole paths where two names are equal.

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
    """Split a module's full name into the index of its block and its name there; (None, full name) outside blocks.

    >>> place("model.layers.3.mlp.up_proj"), place("lm_head")
    ((3, 'mlp.up_proj'), (None, 'lm_head'))
    """
    found = re.fullmatch(r".*?\.(\d{1,6})\.(.+)", name)
    return (int(found[1]), found[2]) if found else (None, name)


def number(value: Any) -> float | None:
    """Number from a file's value; None for anything but a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def whole_number(value: Any) -> int | None:
    """Count from a file's value; None for anything but a whole number from 0 to 2^63 − 1."""
    return value if type(value) is int and 0 <= value < 2**63 else None


def _base(card: Mapping[str, Any]) -> str | None:
    """Name of the base model, with the quantised file that its weights were read from, if any."""
    base, source = _text(card.get("base_model")), card.get("source")
    return f"{base}: {source_line(source)}" if base and isinstance(source, Mapping) else base


def _text(value: Any) -> str | None:
    """Text from a file's value, cut at 1,000 characters; None for anything else, or nothing."""
    return value[:1000] if isinstance(value, str) and value else None


def _folded(spec: Structure, details: Any, spectra: tuple[Tensor, ...]) -> Folded:
    """Folded module with the card's details about it, whatever these are."""
    details = details if isinstance(details, Mapping) else {}
    error, size = number(details.get("error")), whole_number(details.get("bytes"))
    return Folded(spec, error, _text(details.get("metric")), spectra, size)


def _narrowed(details: Mapping[str, Any]) -> dict[str, Structure]:
    """Structures of the layers of a plain model that lost hidden units, by the card; none where one is unreadable."""
    found = {}
    for name, each in details.items():
        beside = ("parameters", "bytes", "error", "metric")
        try:
            found[str(name)] = spec_from_dict({key: value for key, value in dict(each).items() if key not in beside})
            check_size(found[str(name)])
        except (TensorfoldError, TypeError, ValueError, ArithmeticError):
            return {}
    return found


def _choices(stored: Any) -> dict[str, Chosen]:
    """Choices of a search, by layer, from a card's value; entries that cannot be drawn are left out."""
    found = {}
    for name, choice in stored.items() if isinstance(stored, Mapping) else ():
        points = choice.get("curve") if isinstance(choice, Mapping) else None
        size = number(choice.get("parameters")) if isinstance(choice, Mapping) else None
        pairs = [p for p in points if isinstance(p, list) and len(p) == 2] if isinstance(points, list) else []
        curve = [(x, y) for x, y in ((number(a), number(b)) for a, b in pairs) if x is not None and y is not None]
        if size is not None and curve:
            rivals = choice.get("rivals")
            errors = {str(k)[:200]: number(v) for k, v in rivals.items()} if isinstance(rivals, Mapping) else {}
            priced = {k: v for k, v in errors.items() if v is not None}
            found[str(name)] = Chosen(size, tuple(curve), priced, choice.get("dense") is True)
    return found


def _evaluations(path: Path, parameters: int, notes: list[str]) -> tuple[Evaluated, ...]:
    """Last recorded evaluation for every protocol, text and number of tokens.

    Args:
        path: The directory.
        parameters: Parameters that the model has now.
        notes: Takes sentences about lines that cannot be used.
    """
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
    """Evaluation from one line of the record; None if the line is none."""
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
    """Records of a log of JSON lines; ``notes`` takes a sentence about lines that cannot be read."""
    lines, broken = _optional(lambda: read_lines(file), notes) or ([], 0)
    if broken:
        notes.append(f"{file.name}: {broken} lines are no JSON objects and were passed over.")
    return tuple(lines)


def _optional(read: Callable[[], T], notes: list[str]) -> T | None:
    """Result of a call that reads a file; None, and a note, where the file cannot be read."""
    try:
        return read()
    except InputError as error:
        notes.append(f"{error}; left out.")
        return None
