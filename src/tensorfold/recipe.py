"""Recipes: which matrices are folded how, on what text they are calibrated, and how the result is healed and judged.

A recipe is YAML and strict: an unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tensorfold.errors import InputError
from tensorfold.methods import METHODS, LowRank, Method
from tensorfold.strict import check_keys, nearest, strict

if TYPE_CHECKING:
    from tensorfold.anatomy import Targets


@dataclasses.dataclass(frozen=True)
class Rule:
    """One entry of a recipe: the matrices named by ``targets``, less ``exclude``, are folded by ``method``."""

    targets: Targets
    method: Method
    exclude: Targets | None = None


@strict
class CalibrateSettings:
    """Calibration text (the Contract's ``TEXT``, its validation split where named) and how many tokens of it."""

    text: str = "wikitext-2"
    tokens: int = 24_000


@strict
class EvalSettings:
    """Evaluation text (test split where named), protocol, and how many tokens of it (all if None)."""

    text: str = "wikitext-2"
    protocol: str = "hf-1024"
    max_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Rules in order (the first whose targets match a matrix wins) and optional settings for the other commands."""

    fold: tuple[Rule, ...]
    model: str | None = None
    calibrate: CalibrateSettings | None = None
    eval: EvalSettings | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "fold", tuple(self.fold))
        if not self.fold or not all(isinstance(rule, Rule) for rule in self.fold):
            raise InputError(f"recipe: fold={list(self.fold)!r}; needed at least one entry with targets and a method.")

    @classmethod
    def keep(cls, keep: float, targets: Targets = "mlp") -> Recipe:
        """The recipe of ``--keep F --targets T``: the best structure known for a fraction of the parameters."""
        return cls(fold=(Rule(targets, LowRank(keep=keep)),))

    @classmethod
    def of(cls, recipe: Recipe | Method | Mapping[str, Any] | str | Path) -> Recipe:
        """A recipe from whatever stands for one: a recipe, a method (for the MLP), a mapping, a name or a file."""
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, Method):
            return cls(fold=(Rule("mlp", recipe),))
        if isinstance(recipe, Mapping):
            return cls.from_dict(dict(recipe))
        return cls.load(recipe)

    @classmethod
    def load(cls, name_or_path: str | Path) -> Recipe:
        """A shipped recipe by name, or a YAML file.

        Raises:
            InputError: Neither exists, the file is not UTF-8 YAML, or a key or value in it is wrong.
        """
        text = recipe_source(name_or_path)
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"recipe {name_or_path}: not valid YAML: {' '.join(str(error).split())}") from None
        return dataclasses.replace(cls.from_dict(data), name=Path(name_or_path).stem)

    @classmethod
    def from_dict(cls, data: Any) -> Recipe:
        """A recipe from the mapping its YAML holds.

        Raises:
            InputError: An unknown key (the nearest known one is named) or a value of the wrong type or range.
        """
        check_keys("recipe", data, ("model", "fold", "calibrate", "heal", "eval"))
        entries = data.get("fold")
        if not isinstance(entries, list) or not entries:
            raise InputError(f"recipe: fold={entries!r}; needed a list of entries with targets and a method.")
        model = data.get("model")
        if model is not None and not isinstance(model, str):
            raise InputError(f"recipe: model={model!r}; needed a model's name or path.")
        return cls(
            fold=tuple(_rule(k, entry) for k, entry in enumerate(entries)),
            model=model,
            calibrate=_settings("calibrate", CalibrateSettings, data),
            eval=_settings("eval", EvalSettings, data),
        )


def _settings(key: str, kind: Any, data: Mapping[str, Any]) -> Any:
    if data.get(key) is None:
        return None
    check_keys(f"recipe: {key}", data[key], [field.name for field in dataclasses.fields(kind)])
    return kind(**data[key])


def _rule(index: int, entry: Any) -> Rule:
    where = f"recipe: fold[{index}]"
    if not isinstance(entry, dict):
        raise InputError(f"{where}: got {entry!r}; needed a mapping with targets and method.")
    if "targets" not in entry:
        raise InputError(f"{where}: no targets; needed mlp, attention, embedding, all-linear, a list or a regex.")
    method = entry.get("method")
    if method not in METHODS:
        raise InputError(f"{where}: method {method!r} is unknown; {nearest(str(method), METHODS)}")
    kind = METHODS[method]
    own = [field.name for field in dataclasses.fields(kind)]
    check_keys(where, entry, ["targets", "exclude", "method", *own])
    for key in ("targets", "exclude"):
        value = entry.get(key)
        texts = isinstance(value, str | dict) or (isinstance(value, list) and all(isinstance(v, str) for v in value))
        if value is not None and not texts:
            raise InputError(f"{where}: {key}={value!r}; needed a name, a list of names or {{regex: ...}}.")
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items() if k in own}
    return Rule(entry["targets"], kind(**settings), entry.get("exclude"))


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    folder = resources.files("tensorfold") / "recipes"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def recipe_source(name_or_path: str | Path) -> str:
    """The YAML text of a shipped recipe or of a file.

    Raises:
        InputError: Neither exists, or the file is not UTF-8.
    """
    shipped = shipped_recipes()
    if str(name_or_path) in shipped:
        return (resources.files("tensorfold") / "recipes" / f"{name_or_path}.yaml").read_text(encoding="utf-8")
    path = Path(name_or_path)
    if not path.is_file():
        raise InputError(f"recipe {str(name_or_path)!r}: no such file or shipped recipe; {nearest(path.stem, shipped)}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"recipe {path}: not UTF-8 text; save it as UTF-8.") from None
    except OSError as error:
        raise InputError(f"recipe {path}: cannot be read: {error.strerror}.") from None
