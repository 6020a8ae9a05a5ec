"""Which matrix gets which spec. Needs shapes only, so it works on the meta device without weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from tensorfold.algebra.specs.registry import check_size
from tensorfold.algebra.specs.structure import Structure
from tensorfold.errors import InputError, SpecError
from tensorfold.folding.tables import module_table, size_lines
from tensorfold.hf.surgery import keep_layers, split_linear, take_experts_apart, untie_head, without_weights
from tensorfold.hf.ties import check_sayable, disagreement
from tensorfold.methods import Method
from tensorfold.methods.auto import Auto
from tensorfold.models.anatomy import (
    ALREADY_FOLDED,
    Matrix,
    check_foldable,
    check_not_quantised,
    check_unshared,
    count_parameters,
    empty_model,
    expert_tensors,
    matrices,
    width,
)
from tensorfold.models.experts import fused_experts
from tensorfold.models.multiply_adds import dense_macs, experts_per_token, shares
from tensorfold.models.sizes import stored_bytes
from tensorfold.models.targets import match
from tensorfold.recipes.recipe import Recipe, Rule
from tensorfold.utils.torch_modes import in_usual_modes


@dataclass(frozen=True)
class Budget:
    """Linear layers that share what an :class:`Auto` may keep; the plan gives them equal fractions.

    How many numbers ``keep`` leaves them is decided here; what counts against these, ``folding.budgets`` says.
    """

    method: Auto
    names: tuple[str, ...]

    def total(self, dense: int) -> int:
        """Numbers, in the dtype of the weights, that layers of ``dense`` parameters may keep together."""
        return math.floor(self.method.keep * dense)

    def least(self, share: Structure) -> float:
        """Numbers that a layer keeps at least, from the structure that an equal share gives it."""
        return min(self.method.floor * self.method.keep * share.dense_parameters, share.parameters)


@dataclass(frozen=True)
class Plan:
    """Parameter counts of the whole model (a tied head once) and the spec of every folded module.

    ``parameters_before`` is of the model as given, ``parameters_after`` of what is there afterwards: a head that the
    recipe unties is counted once before and by itself after. ``bytes_before`` and ``bytes_after`` are of everything
    that a checkpoint holds, stored orders included: ``other_bytes`` of all that is not targeted, and
    ``targeted_bytes`` of each targeted matrix as it was. ``dense`` are the parameters of targeted matrices that a
    search leaves as they are. ``macs_before`` are the multiply–adds a token of all linear layers, the head among them,
    as given; ``other_macs`` those of layers that are not targeted, ``targeted_macs`` of each targeted matrix as it was.
    Experts count by the share of tokens that they are sent, ``experts_per_token`` of a layer's (0 where the
    configuration does not say; they are then left out).
    ``str(plan)`` is the table people read.
    """

    parameters_before: int
    parameters_after: int
    modules: dict[str, Structure]
    methods: dict[str, Method] = field(repr=False)
    targeted_before: int = 0
    split: dict[str, list[int]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    budgets: tuple[Budget, ...] = field(default=(), repr=False)
    dense: int = 0
    bytes_before: int = 0
    other_bytes: int = field(default=0, repr=False)
    targeted_bytes: dict[str, int] = field(default_factory=dict, repr=False)
    macs_before: int = 0
    other_macs: int = field(default=0, repr=False)
    targeted_macs: dict[str, float] = field(default_factory=dict, repr=False)
    experts_per_token: int | None = None

    def bytes_of(self, name: str) -> int:
        """Bytes of one targeted matrix afterwards, in the dtype that it had, with its stored orders."""
        dense, spec = self.targeted_bytes[name], self.modules.get(name)
        if spec is None:  # left as it is
            return dense
        return spec.parameters * dense // spec.dense_parameters + spec.order_bytes

    @property
    def bytes_after(self) -> int:
        return self.other_bytes + sum(self.bytes_of(name) for name in self.targeted_bytes)

    @property
    def macs_after(self) -> int:
        """Multiply–adds a token of all linear layers afterwards."""
        folded, after = self.modules, float(self.other_macs)
        for name, dense in self.targeted_macs.items():
            after += dense * folded[name].macs / folded[name].dense_parameters if name in folded else dense
        return round(after)

    def with_specs(self, specs: Mapping[str, Structure | None]) -> Plan:
        """The plan with other structures for some of its matrices; None leaves a matrix dense, outside the plan."""
        modules = {name: spec for name, spec in {**self.modules, **specs}.items() if spec is not None}
        dense = sum(self.modules[name].dense_parameters for name, spec in specs.items() if spec is None)
        before = sum(self.modules[name].parameters for name in specs)
        after = dense + sum(spec.parameters for spec in specs.values() if spec is not None)
        return replace(self, modules=modules, dense=dense, parameters_after=self.parameters_after + after - before)

    def of_plain(self, model: PreTrainedModel) -> Plan:
        """The plan with the sizes of the plain model that came of it: biases are smaller, and no order is stored."""
        rest = stored_bytes(model) - sum(self.bytes_of(name) for name in self.targeted_bytes)
        return replace(self, parameters_after=count_parameters(model), other_bytes=rest)

    @property
    def kept(self) -> float:
        """Fraction of the targeted matrices' parameters that stays."""
        folded = self.dense + sum(spec.parameters for spec in self.modules.values())
        return folded / self.targeted_before if self.targeted_before else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: whole-model counts and, by module, modes, ranks, parameters and bytes."""
        return {
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "macs_before": self.macs_before,
            "macs_after": self.macs_after,
            **({} if self.experts_per_token is None else {"experts_per_token": self.experts_per_token}),
            "modules": {name: {**_shape(spec), "bytes": self.bytes_of(name)} for name, spec in self.modules.items()},
            **({"multiples": self.multiples} if self.multiples else {}),
            **({"warnings": list(self.warnings)} if self.warnings else {}),
        }

    @property
    def multiples(self) -> dict[str, int]:
        """What was asked to divide ranks, hidden units and heads, by module where that is more than 1."""
        asked = {name: getattr(self.methods.get(name), "multiple", 1) for name in self.modules}
        return {name: multiple for name, multiple in asked.items() if multiple > 1}

    def __str__(self) -> str:
        return self.table()

    def table(self, errors: Mapping[str, float] | None = None, error_name: str = "error") -> str:
        """The folded modules, with their errors where there are any, and the sizes of the whole model."""
        table = module_table(self.modules, errors, error_name)
        return "\n".join([table, *size_lines(self), *(f"warning: {warning}" for warning in self.warnings)])


def _shape(spec: Structure) -> dict[str, Any]:
    shape: dict[str, Any] = dict(spec.modes_and_ranks())
    return {**shape, **spec.to_dict(), "parameters": spec.parameters}


@in_usual_modes
def plan(
    model_or_config: PreTrainedModel | PreTrainedConfig, recipe: Recipe | Method | Mapping[str, Any] | str | Path
) -> Plan:
    """Choose the spec of every matrix that ``recipe`` targets; changes nothing and needs no weights.

    Raises:
        InputError: A target matches nothing, a matrix is shared, or the model cannot be folded.
        SpecError: A method cannot meet its shape or budget on a matrix; the message names the module.
    """
    recipe = Recipe.of(recipe)
    model = skeleton(model_or_config)
    check_foldable(model)
    if not recipe.untie:
        check_sayable(model)
    said = disagreement(model)
    if model is model_or_config and recipe.changes_modules:
        model = without_weights(model)
    return prepare(model, recipe, said)[0]


def skeleton(model_or_config: PreTrainedModel | PreTrainedConfig) -> PreTrainedModel:
    """The model itself, or one built from its configuration on the meta device."""
    if isinstance(model_or_config, PreTrainedModel):
        return model_or_config
    if not isinstance(model_or_config, PreTrainedConfig):
        raise InputError(f"got {type(model_or_config).__name__}; needed a transformers model or its configuration.")
    stored = getattr(model_or_config, "quantization_config", None)
    if isinstance(stored, dict) and stored.get("quant_method") == "tensorfold":
        raise InputError(ALREADY_FOLDED)
    check_not_quantised(model_or_config, type(model_or_config).__name__)
    return empty_model(model_or_config)


def prepare(model: PreTrainedModel, recipe: Recipe, said: str | None = None) -> tuple[Plan, dict[str, Matrix]]:
    """The plan and the matrices it is about, after untying, dropping layers and splitting fused matrices in place.

    Args:
        said: What :func:`~.ties.disagreement` says of the model as it was given; a warning of the plan.

    Raises:
        InputError, SpecError: As :func:`plan`.
    """
    check_foldable(model)
    before, bytes_before, macs_before = count_parameters(model), stored_bytes(model), dense_macs(model)
    untied = untie_head(model) if recipe.untie else None
    added = count_parameters(model) - before
    if recipe.layers is not None:
        keep_layers(model, recipe.layers)
    methods, split, budgets = _assign(model, recipe)
    every = {**matrices(model), **expert_tensors(model)}
    chosen = {name: matrix for name, matrix in every.items() if name in methods}
    check_unshared(model, chosen.values())
    specs = {name: _spec(matrix, methods[name], width(model)) for name, matrix in chosen.items()}
    targeted = sum(matrix.parameter.numel() for matrix in chosen.values())
    after = count_parameters(model) - targeted + sum(spec.parameters for spec in specs.values())
    warnings = (
        *([said] if said and not recipe.untie else []),
        *_untying(untied, added, after - before),
        *_warnings(specs),
    )
    bytes_ = {name: matrix.parameter.nbytes for name, matrix in chosen.items()}
    # A table multiplies where a head is tied to it, and nowhere else.
    multiplying = {name: m for name, m in chosen.items() if m.kind == "linear" or m.tied_head is not None}
    share = shares(model)
    macs = {name: share(name) * matrix.parameter.numel() for name, matrix in multiplying.items()}
    return Plan(
        before,
        after,
        specs,
        methods,
        targeted,
        split,
        warnings,
        budgets,
        bytes_before=bytes_before,
        other_bytes=stored_bytes(model) - sum(bytes_.values()),
        targeted_bytes=bytes_,
        macs_before=macs_before,
        other_macs=dense_macs(model) - round(sum(macs.values())),
        targeted_macs=macs,
        experts_per_token=experts_per_token(model),
    ), chosen


def carry_out(model: PreTrainedModel, recipe: Recipe, planned: Plan) -> dict[str, Matrix]:
    """Untie, drop layers and split fused matrices in place, as was planned.

    Returns:
        The matrices to fold, by name, in the order of the plan.
    """
    if recipe.untie:
        untie_head(model)
    if recipe.layers is not None:
        keep_layers(model, recipe.layers)
    fused = fused_experts(model)
    for name, sizes in planned.split.items():
        if name in fused:
            take_experts_apart(model, name)
        else:
            split_linear(model, name, sizes)
    available = {**matrices(model), **expert_tensors(model)}
    return {name: available[name] for name in planned.modules}


def _assign(
    model: PreTrainedModel, recipe: Recipe
) -> tuple[dict[str, Method], dict[str, list[int]], tuple[Budget, ...]]:
    """Which method folds which matrix, the sizes of the parts of every matrix that was split for it, and budgets."""
    methods: dict[str, Method] = {}
    split: dict[str, list[int]] = {}
    budgets = []
    available, apart = matrices(model), fused_experts(model)
    for place, rule in enumerate(recipe.fold):
        before = set(methods)
        targets = match(rule.targets, available, model)
        excluded = match(rule.exclude, available, model) if rule.exclude is not None else []
        _check_rule(place, rule, targets, excluded, methods.keys() | split.keys())
        if rule.method.joins_experts:
            joined = _joined(place, rule, available, [name for name in targets if name not in excluded], methods)
            methods.update(dict.fromkeys(joined, rule.method))
            split.update({name: [apart[name].matrix_shape[0]] * apart[name].experts for name in joined})
            continue
        for name in targets:
            if name in excluded or name in methods or name in split or available[name].fused in methods:
                continue
            if rule.split is None:
                methods[name] = rule.method
                if (fused := available[name].fused) is not None:
                    split[fused] = [available[name].out_features] * apart[fused].experts
            elif available[name].fused is not None:
                raise InputError(f"split: {name} is one of the experts of a tensor; leave out split, they are parted.")
            else:
                check_unshared(model, [available[name]])
                parts = split_linear(model, name, rule.split)
                methods.update(dict.fromkeys(parts, rule.method))
                split[name] = [model.get_submodule(part).weight.shape[0] for part in parts]  # type: ignore[union-attr]
        if isinstance(rule.method, Auto):
            new = {name: matrix for name, matrix in matrices(model).items() if name in methods.keys() - before}
            methods.update({name: rule.method.concrete(matrix.group) for name, matrix in new.items()})
            linear = tuple(name for name, matrix in new.items() if matrix.kind == "linear")
            budgets += [Budget(rule.method, linear)] if linear else []
    return methods, split, tuple(budgets)


def _joined(
    place: int, rule: Rule, available: Mapping[str, Matrix], targets: Collection[str], taken: Collection[str]
) -> list[str]:
    """Names of the tensors all of whose experts are targets of a rule, and folded by no rule before it.

    Raises:
        InputError: A target is no expert, or not all experts of its tensor are targets.
    """
    where = f"recipe: fold[{place}] (targets: {rule.targets}): {rule.method.name}"
    members: dict[str, list[str]] = {}
    for name, matrix in available.items():
        if matrix.fused is not None:
            members.setdefault(matrix.fused, []).append(name)
    out: dict[str, None] = {}
    for name in targets:
        tensor = available[name].fused
        if tensor is None:
            raise InputError(f"{where} folds all experts of a tensor together, and {name} is in none; exclude it.")
        if not set(members[tensor]) <= set(targets):
            raise InputError(f"{where} folds all experts of {tensor} together; needed all of them among its targets.")
        if tensor not in taken and not set(members[tensor]) & set(taken):
            out[tensor] = None
    return list(out)


def _check_rule(
    place: int, rule: Rule, targets: Collection[str], excluded: Collection[str], taken: Collection[str]
) -> None:
    """Raise :class:`InputError` for an entry of a recipe, or an ``exclude`` in it, that changes nothing."""
    where, left = f"recipe: fold[{place}] (targets: {rule.targets})", set(targets) - set(excluded)
    if not left:
        raise InputError(f"{where} excludes every matrix it targets; nothing is left to fold.")
    if rule.exclude is not None and len(left) == len(targets):
        raise InputError(f"{where}: exclude: {rule.exclude} has no effect here; it needs to name some of the targets.")
    if left <= set(taken):
        raise InputError(f"{where} has no effect: entries before it fold all it targets. Put it first, or drop it.")


def _untying(untied: Matrix | None, added: int, growth: int) -> Iterator[str]:
    """What untying cost, and whether folding made up for it."""
    if untied is not None and added:
        end = f"and the model is {growth:,} larger than before" if growth > 0 else "no more than folding took away"
        yield f"untying {untied.tied_head} from {untied.name} added {added:,} parameters, {end}"


def _warnings(specs: Mapping[str, Structure]) -> Iterator[str]:
    """Shapes that cannot reach full rank whatever their values, each named once."""
    for spec in dict.fromkeys(specs.values()):
        full = min(spec.out_features, spec.in_features)
        if not spec.is_low_rank and spec.attainable_matrix_rank < full:
            name = next(name for name, other in specs.items() if other == spec)
            yield f"{name}: {spec} reaches rank {spec.attainable_matrix_rank} of {full} at most"


def _spec(matrix: Matrix, method: Method, states: int) -> Structure:
    if method.tables_only and matrix.kind != "embedding":
        raise SpecError(
            f"{matrix.name}: {method.name} folds embedding tables, and this is a linear layer; use it with "
            "targets: embedding or positions, and another method here."
        )
    if method.token_order != "own" and matrix.kind != "embedding":
        raise SpecError(
            f"{matrix.name}: order: {method.token_order} sorts the tokens of embedding tables, and this is a linear "
            "layer; use it with targets: embedding or positions, and order: own here."
        )
    try:
        if matrix.experts:
            rows = matrix.out_features // matrix.experts
            spec = method.spec_of_experts(matrix.experts, rows, matrix.in_features, states)
        else:
            spec = method.spec(matrix.out_features, matrix.in_features)
        check_size(spec)
        return spec
    except SpecError as error:
        raise SpecError(f"{matrix.name}: {error}") from None
