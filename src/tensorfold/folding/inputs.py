"""What ``fold`` is given, looked at before the model is touched: plan, weights, and whether all ranks agree."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from tensorfold.calibration.gradients import next_token_logits
from tensorfold.errors import InputError
from tensorfold.folding.budgets import check_budgets, searched
from tensorfold.folding.plan import Plan, plan
from tensorfold.folding.text import Text
from tensorfold.hf.modules import scale_of
from tensorfold.hf.surgery import hidden_units
from tensorfold.methods import Method
from tensorfold.methods.base import Use, check_use
from tensorfold.models.anatomy import Matrix, expert_tensors, matrices
from tensorfold.models.modes import evaluation_mode
from tensorfold.models.residency import WHOLE, Residency
from tensorfold.recipes.recipe import Recipe
from tensorfold.utils.distributed import Ranks
from tensorfold.utils.fingerprints import describe_configuration, hash_tensor, saved_tensors
from tensorfold.utils.torch_modes import check_takes_gradients

_ROWS = 4096  # of a weight, looked at together


def checked_plan(model: PreTrainedModel, recipe: Recipe, calibrated: bool, residency: Residency = WHOLE) -> Plan:
    """The plan, after finding whatever is wrong with recipe and weights before the model is touched."""
    planned = plan(model, recipe)
    available = {**matrices(model), **{n: m for n, m in expert_tensors(model).items() if n in planned.modules}}
    for name, method in planned.methods.items():
        # Of tables, text knows the one that it goes in by, and none of positions.
        known = name not in available or available[name].kind == "linear" or available[name].group == "embedding"
        check_method(method, name, planned, calibrated and known)
    check_uses(model, recipe, planned, calibrated or recipe.calibrate is not None)
    if calibrated:
        check_text_used(model, recipe, planned)
        check_budgets(model, planned)
        _check_loss(model, planned, available)
    chosen = available if recipe.changes_modules else {name: available[name] for name in planned.modules}
    for matrix in residency.each(chosen.values()):
        if matrix.parameter.is_meta:
            raise InputError(f"{matrix.name}: has no weights (meta device); load the model's weights first.")
        if not all(bool(rows.isfinite().all()) for rows in matrix.parameter.detach().split(_ROWS)):
            raise InputError(f"{matrix.name}: its weight holds NaN or infinity; repair the checkpoint or exclude it.")
        if matrix.kind == "embedding" and matrix.name in planned.modules:
            scale_of(matrix)
    return planned


def _check_loss(model: PreTrainedModel, planned: Plan, available: Mapping[str, Matrix]) -> None:
    """Raise :class:`InputError` if the plan needs gradients of the text's loss and the model has no such loss."""
    tables = [n for n, method in planned.methods.items() if n in available and available[n].group == "embedding"]
    if searched(model, planned) or any(planned.methods[name].fits_text for name in tables):
        check_takes_gradients(model, "fold with calibration text")
        with evaluation_mode(model), torch.no_grad():
            next_token_logits(model, torch.zeros(1, 2, dtype=torch.long, device=model.device))


def check_uses(model: PreTrainedModel, recipe: Recipe, planned: Plan, calibrated: bool) -> None:
    """Raise :class:`InputError` for settings of methods, and for text, that make no difference to this fold.

    Args:
        calibrated: Whether there is text, or would be if the caller had not done without the recipe's.
    """
    linear = {budget.method for budget in planned.budgets}
    units = hidden_units(model, matrices(model)) if any(rule.method.reorders_hidden for rule in recipe.fold) else []
    hidden = {planned.methods.get(matrix.name) for each in units for matrix in (*each.ups, each.down)}
    for rule in recipe.fold:
        reordered = rule.method in hidden or recipe.changes_modules  # which may give the layers other names
        check_use(Use(rule.method, calibrated, rule.method in linear, reordered))


def check_text_used(model: PreTrainedModel, recipe: Recipe, planned: Plan) -> None:
    """Raise :class:`InputError` if no matrix is fitted to calibration text, nor its error measured on it."""
    tables = {name for name, matrix in matrices(model).items() if matrix.kind == "embedding"}
    methods = {name: planned.methods[name] for name in planned.modules}
    if not any(name not in tables or m.fits_text or m.token_order == "frequency" for name, m in methods.items()):
        kinds = " and ".join(sorted({method.name for method in methods.values()})) or "dropping layers"
        raise InputError(
            f"fold: the calibration text has no effect here; {kinds} looks at no text. Fold without it: leave out "
            "--calibrate (calibration=None), and calibrate from the recipe."
        )


def check_method(method: Method, name: str, planned: Plan, calibrated: bool) -> None:
    """Raise :class:`InputError`, naming the matrix, if its method cannot fill the spec that is planned for it."""
    spec = planned.modules[name]
    if not spec.kind:
        raise InputError(
            f"{name}: {type(spec).__name__} has no kind, by which a saved model finds its structure again; give the "
            'class one: kind = "…".'
        )
    try:
        method.check(planned.modules[name], calibrated)
    except InputError as error:
        raise type(error)(f"{name}: {error}") from None


def identity_of(recipe: Recipe) -> str:
    """What of a recipe decides the result of a fold."""
    return repr((recipe.fold, recipe.layers, recipe.untie))


def identity(model: PreTrainedModel, recipe: Recipe, text: Text, residency: Residency = WHOLE) -> dict[str, object]:
    """All that decides the result of a fold, by name."""
    given: dict[str, object] = {
        "recipe": identity_of(recipe),
        "calibration text": [None if part is None else hash_tensor(part) for part in (text.windows, text.counts)],
        "configuration": describe_configuration(model.config),
    }
    return {**given, **{name: hash_tensor(tensor) for name, tensor in residency.each(saved_tensors(model))}}


def check_same(ranks: Ranks, given: dict[str, object], what: str = "model, recipe and text") -> None:
    """Find out before anything is touched if the ranks would fold different models into one.

    Args:
        given: All that decides the result, by name.
        what: Is needed to be the same, in words.

    Raises:
        InputError: They would; the message names what differs.
    """
    first, *others = ranks.gather(given)
    for rank, other in enumerate(others, start=1):
        different = [what for what in {**first, **other} if first.get(what) != other.get(what)]
        if different:
            raise InputError(
                f"fold: {different[0]} of rank {rank} is not that of rank 0; needed the same {what} on every rank. "
                "Give all of them the same files."
            )
