"""Recipes: which matrices a method folds, the calibration text, and how the result is healed and evaluated.

A recipe is read from YAML, and strictly: an unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tensorfold.errors import InputError, pass_on_memory
from tensorfold.methods import METHODS, Method
from tensorfold.methods.auto import Auto
from tensorfold.methods.base import TEXT
from tensorfold.recipes.settings import HEAL_NEEDS, CalibrateSettings, EvalSettings, HealSettings
from tensorfold.utils.atomic_files import check_path
from tensorfold.utils.effects import check_effects
from tensorfold.utils.validation import check_keys, check_types, nearest

if TYPE_CHECKING:
    from tensorfold.models.targets import Targets


@dataclasses.dataclass(frozen=True)
class Rule:
    """One entry of a recipe: a method, and the matrices that it folds.

    Args:
        targets: Matrices to fold: a group such as ``mlp``, a list of names, or a regex.
        method: Method and its settings.
        exclude: Matrices among the targets that stay dense.
        split: How to take a fused matrix apart before its parts are folded, each by itself: into this many equal parts,
            or into parts of these sizes. 3 separates query, key and value in GPT-2's ``c_attn``.

    Raises:
        InputError: A value is of the wrong type.
    """

    targets: Targets
    method: Method
    exclude: Targets | None = None
    split: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_types("rule", targets=(self.targets, str | list | tuple | Mapping), method=(self.method, Method))
        check_types("rule", exclude=(self.exclude, str | list | tuple | Mapping | None))
        check_types("rule", split=(self.split, int | list | tuple | None))
        for names in (self.targets, self.exclude):
            if isinstance(names, list | tuple) and not all(isinstance(name, str) for name in names):
                raise InputError(f"rule: got {names!r:.100}; needed a list of names.")
        _check_split("rule", self.split)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A plan for folding a model, and optionally for calibrating, healing and evaluating it.

    Args:
        fold: Rules in order; a matrix is folded by the first rule whose targets match it.
        model: Name or path of the model that the recipe is for.
        calibrate: Calibration text.
        heal: Settings of healing, a stage each, such as the two stages of Krony-PT.
        eval: Text and protocol of evaluation.
        layers: Indices of the blocks that are kept before anything is folded, as DistilGPT2 keeps six; None for all.
            With it there may be no rules.
        name: The recipe's name, for reports.
        untie: Whether a head that is tied to the input table first gets a copy of its weight, so that the two can be
            folded differently. Makes no difference to a model whose head is not tied.

    Raises:
        InputError: There is nothing to do, or a value is of the wrong type.
    """

    fold: tuple[Rule, ...]
    model: str | None = None
    calibrate: CalibrateSettings | None = None
    heal: tuple[HealSettings, ...] = ()
    eval: EvalSettings | None = None
    layers: tuple[int, ...] | None = None
    name: str | None = None
    untie: bool = False

    def __post_init__(self) -> None:
        check_types("recipe", fold=(self.fold, tuple | list), layers=(self.layers, tuple | list | None))
        object.__setattr__(self, "fold", tuple(self.fold))
        if not (self.fold or self.layers) or not all(isinstance(rule, Rule) for rule in self.fold):
            raise InputError(f"recipe: fold={list(self.fold)!r}; needed at least one entry with targets and a method.")
        if not isinstance(self.untie, bool):
            raise InputError(f"recipe: untie={self.untie!r}; needed true or false.")

    @property
    def changes_modules(self) -> bool:
        """Whether planning unties the head, drops blocks or splits matrices, and so has to work on a copy."""
        return self.untie or self.layers is not None or any(rule.split is not None for rule in self.fold)

    def without_text(self) -> Recipe:
        """A copy of the recipe without calibration, in which settings that need text have their defaults."""
        return dataclasses.replace(self, fold=tuple(_without_text(rule) for rule in self.fold), calibrate=None)

    @classmethod
    def keep(
        cls, keep: float, targets: Targets = "mlp", effort: str = "medium", plain: bool = False, multiple: int = 1
    ) -> Recipe:
        """The recipe that ``--keep``, ``--targets`` and the options beside them stand for: the method ``auto``.

        Args:
            keep: Fraction of the targets' parameters that stays.
            targets: Matrices to fold.
            effort: How much time calibration takes: ``low``, ``medium`` or ``high``.
            plain: Whether only MLPs become smaller, and the result is a plain transformers model.
            multiple: What divides the ranks, hidden units and heads that are chosen.
        """
        method = Auto(keep=keep, effort=effort, plain=plain, multiple=multiple)  # type: ignore[arg-type]
        return cls(fold=(Rule(targets, method),))

    @classmethod
    def of(cls, recipe: Recipe | Method | Mapping[str, Any] | str | Path) -> Recipe:
        """A recipe from anything that stands for one.

        Args:
            recipe: A recipe; a method, which then folds the embedding if it is one for tables, else the MLP; the
                mapping that a YAML file holds; or a name or file.

        Raises:
            InputError: It stands for no recipe, or a key or value in it is wrong.
        """
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, Method):
            table = recipe.tables_only or recipe.token_order != "own"
            return cls(fold=(Rule("embedding" if table else "mlp", recipe),))
        if isinstance(recipe, Mapping):
            return cls.from_dict(dict(recipe))
        if not isinstance(recipe, str | Path):
            raise InputError(f"recipe: got {recipe!r}; needed a recipe, a method, a mapping, or a name or file.")
        return cls.load(recipe)

    @classmethod
    def load(cls, name_or_path: str | Path) -> Recipe:
        """Read a shipped recipe by its name, or a YAML file.

        Raises:
            InputError: There is neither, the file is not UTF-8 or not YAML, or a key or value in it is wrong.
        """
        text = recipe_source(name_or_path)
        try:
            data = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise InputError(f"recipe {name_or_path}: not valid YAML: {' '.join(str(error).split())}") from None
        return dataclasses.replace(cls.from_dict(data), name=Path(name_or_path).stem)

    @classmethod
    def from_dict(cls, data: Any) -> Recipe:
        """A recipe from the mapping that its YAML file holds.

        Raises:
            InputError: A key is unknown (the message names the nearest known one), or a value is of the wrong type or
                range.
        """
        check_keys("recipe", data, ("model", "untie", "layers", "fold", "calibrate", "heal", "eval"))
        layers = data.get("layers")
        if layers is not None and not (isinstance(layers, list) and all(type(index) is int for index in layers)):
            raise InputError(f"recipe: layers={layers!r}; needed a list of block indices.")
        entries = data.get("fold", [] if layers else None)
        if not isinstance(entries, list) or not (entries or layers):
            raise InputError(f"recipe: fold={entries!r}; needed a list of entries with targets and a method.")
        model = data.get("model")
        if model is not None and not isinstance(model, str):
            raise InputError(f"recipe: model={model!r}; needed a model's name or path.")
        return cls(
            fold=tuple(_rule(k, entry) for k, entry in enumerate(entries)),
            model=model,
            layers=tuple(layers) if layers else None,
            calibrate=_settings("calibrate", CalibrateSettings, data),
            heal=_stages(data.get("heal")),
            eval=_settings("eval", EvalSettings, data),
            untie=data.get("untie", False),
        )


def _without_text(rule: Rule) -> Rule:
    """A copy of a rule in which the method's settings that need text have their defaults."""
    ours = [name for name, needs in rule.method.needs_of_use.items() if TEXT in needs]
    default = {field.name: field.default for field in dataclasses.fields(rule.method) if field.name in ours}
    return dataclasses.replace(rule, method=dataclasses.replace(rule.method, **default))


def _settings(key: str, kind: Any, data: Mapping[str, Any]) -> Any:
    """The settings in one section of a recipe, as an object of the class ``kind``; None without that section."""
    if data.get(key) is None:
        return None
    check_keys(f"recipe: {key}", data[key], [field.name for field in dataclasses.fields(kind)])
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in data[key].items()})


def _stages(data: Any) -> tuple[HealSettings, ...]:
    """The settings of each stage in a recipe's section ``heal``, which is a mapping or a list of mappings."""
    stages = data if isinstance(data, list) else [] if data is None else [data]
    if None in stages:
        raise InputError("recipe: heal has an empty stage; needed a mapping of settings for each.")
    settings = tuple(_settings("heal", HealSettings, {"heal": stage}) for stage in stages)
    for stage, found in zip(stages, settings, strict=True):
        check_effects("recipe: heal", stage, found.compared, HEAL_NEEDS)
    return settings


def _rule(index: int, entry: Any) -> Rule:
    """The rule in entry ``index`` of a recipe's section ``fold``."""
    where = f"recipe: fold[{index}]"
    if not isinstance(entry, dict):
        raise InputError(f"{where}: got {entry!r}; needed a mapping with targets and method.")
    if not entry.get("targets"):
        raise InputError(
            f"{where}: no targets; needed mlp, attention, experts, embedding, positions, all-linear, a list or a regex."
        )
    method = entry.get("method")
    if not isinstance(method, str) or method not in METHODS:
        raise InputError(f"{where}: method {method!r} is unknown; {nearest(str(method), METHODS)}")
    kind = METHODS[method]
    own = [field.name for field in dataclasses.fields(kind)]
    check_keys(where, entry, ["targets", "exclude", "split", "method", *own])
    for key in ("targets", "exclude"):
        value = entry.get(key)
        texts = isinstance(value, str | dict) or (isinstance(value, list) and all(isinstance(v, str) for v in value))
        if value is not None and not texts:
            raise InputError(f"{where}: {key}={value!r}; needed a name, a list of names or {{regex: ...}}.")
    split = entry.get("split")
    _check_split(where, split)
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items() if k in own}
    return Rule(
        entry["targets"], kind(**settings), entry.get("exclude"), tuple(split) if isinstance(split, list) else split
    )


def _check_split(where: str, split: object) -> None:
    """Raise :class:`InputError` unless ``split`` is None, a number of parts or a list of sizes."""
    sizes = split if isinstance(split, list | tuple) else [1 if split is None else split]
    if not sizes or not all(type(size) is int and size > 0 for size in sizes):
        raise InputError(f"{where}: split={split!r:.100}; needed a number of equal parts or a list of sizes.")


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    folder = resources.files("tensorfold.recipes")
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def recipe_source(name_or_path: str | Path) -> str:
    """The YAML text of a shipped recipe or of a file.

    Raises:
        InputError: Neither exists, or the file is not UTF-8.
    """
    shipped = shipped_recipes()
    if str(name_or_path) in shipped:
        return (resources.files("tensorfold.recipes") / f"{name_or_path}.yaml").read_text(encoding="utf-8")
    check_path(name_or_path)
    path = Path(name_or_path)
    if not path.is_file():
        raise InputError(f"recipe {str(name_or_path)!r}: no such file or shipped recipe; {nearest(path.stem, shipped)}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"recipe {path}: not UTF-8 text; save it as UTF-8.") from None
    except OSError as error:
        pass_on_memory(error)
        raise InputError(f"recipe {path}: cannot be read: {error.strerror}.") from None
