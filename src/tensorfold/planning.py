"""Which matrix gets which spec. Needs shapes only, so it works on the meta device without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from tensorfold.algebra.spec import Spec
from tensorfold.anatomy import (
    ALREADY_FOLDED,
    Matrix,
    check_foldable,
    check_unshared,
    count_parameters,
    empty_model,
    match,
    matrices,
)
from tensorfold.errors import InputError, SpecError
from tensorfold.methods import Method
from tensorfold.recipe import Recipe
from tensorfold.report import module_table


@dataclass(frozen=True)
class Plan:
    """Parameter counts of the whole model (a tied head once) and the spec of every folded module.

    ``str(plan)`` is the table people read.
    """

    parameters_before: int
    parameters_after: int
    modules: dict[str, Spec]
    methods: dict[str, Method] = field(repr=False)
    targeted_before: int = 0

    @property
    def kept(self) -> float:
        """Fraction of the targeted matrices' parameters that stays."""
        return sum(spec.parameters for spec in self.modules.values()) / self.targeted_before

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: whole-model counts and, by module, modes, ranks and parameters."""
        return {
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "modules": {name: {**spec.to_dict(), "parameters": spec.parameters} for name, spec in self.modules.items()},
        }

    def __str__(self) -> str:
        return module_table(self.modules, self.parameters_before, self.parameters_after, self.kept)


def plan(
    model_or_config: PreTrainedModel | PreTrainedConfig, recipe: Recipe | Method | Mapping[str, Any] | str | Path
) -> Plan:
    """Choose the spec of every matrix that ``recipe`` targets; changes nothing and needs no weights.

    Raises:
        InputError: A target matches nothing, a matrix is shared, or the model cannot be folded.
        SpecError: A method cannot meet its shape or budget on a matrix; the message names the module.
    """
    return plan_matrices(skeleton(model_or_config), recipe)[0]


def skeleton(model_or_config: PreTrainedModel | PreTrainedConfig) -> PreTrainedModel:
    """The model itself, or one built from its configuration on the meta device."""
    if isinstance(model_or_config, PreTrainedModel):
        return model_or_config
    if not isinstance(model_or_config, PreTrainedConfig):
        raise InputError(f"got {type(model_or_config).__name__}; needed a transformers model or its configuration.")
    stored = getattr(model_or_config, "quantization_config", None)
    if isinstance(stored, dict) and stored.get("quant_method") == "tensorfold":
        raise InputError(ALREADY_FOLDED)
    return empty_model(model_or_config)


def plan_matrices(model: PreTrainedModel, recipe: Any) -> tuple[Plan, dict[str, Matrix]]:
    """The plan, and the matrices it is about."""
    check_foldable(model)
    available = matrices(model)
    methods: dict[str, Method] = {}
    for rule in Recipe.of(recipe).fold:
        excluded = match(rule.exclude, available) if rule.exclude is not None else []
        for name in match(rule.targets, available):
            if name not in excluded:
                methods.setdefault(name, rule.method)
    chosen = {name: matrix for name, matrix in available.items() if name in methods}
    if not chosen:
        raise InputError("the recipe excludes every matrix it targets; nothing is left to fold.")
    check_unshared(model, chosen.values())
    specs = {name: _spec(matrix, methods[name]) for name, matrix in chosen.items()}
    before = count_parameters(model)
    targeted = sum(matrix.parameter.numel() for matrix in chosen.values())
    after = before - targeted + sum(spec.parameters for spec in specs.values())
    return Plan(before, after, specs, methods, targeted), chosen


def _spec(matrix: Matrix, method: Method) -> Spec:
    try:
        return method.spec(matrix.out_features, matrix.in_features)
    except SpecError as error:
        raise SpecError(f"{matrix.name}: {error}") from None
