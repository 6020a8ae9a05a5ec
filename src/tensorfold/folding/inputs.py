"""What ``fold`` is given, looked at before the model is touched: text, plan, weights, and whether all ranks agree."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tensorfold.calibration.block_stream import calibration_windows, token_counts
from tensorfold.calibration.gradients import next_token_logits
from tensorfold.data.texts import load_text
from tensorfold.data.tokens import check_ids, prefix_of
from tensorfold.errors import InputError
from tensorfold.folding.budgets import check_budgets, searched
from tensorfold.folding.plan import Plan, plan
from tensorfold.hf.modules import scale_of
from tensorfold.methods import Method
from tensorfold.methods.base import Use, check_use
from tensorfold.models.anatomy import Matrix, context_length, matrices
from tensorfold.models.modes import evaluation_mode
from tensorfold.models.surgery import hidden_units
from tensorfold.recipes.recipe import Recipe
from tensorfold.recipes.settings import CalibrateSettings
from tensorfold.utils.distributed import Ranks
from tensorfold.utils.fingerprints import describe_configuration, hash_tensor, saved_tensors
from tensorfold.utils.torch_modes import check_takes_gradients
from tensorfold.utils.validation import check_types


def documents(recipe: Recipe, tokenizer: Any, calibration: Iterable[str] | None) -> list[str] | None:
    """The text given, else the text that the recipe names."""
    if calibration is None and recipe.calibrate is not None:
        if tokenizer is None:
            warnings.warn(
                f"the recipe calibrates on {recipe.calibrate.text!r}, but fold got no tokenizer: "
                "folding without calibration.",
                stacklevel=3,
            )
        else:
            calibration = load_text(recipe.calibrate.text, split="validation")
    if calibration is None:
        return None
    if tokenizer is None:
        raise InputError("fold: got calibration text without a tokenizer; needed the model's tokenizer.")
    check_types("fold", calibration=(calibration, Iterable))
    given = [calibration] if isinstance(calibration, str) else list(calibration)
    if not all(isinstance(document, str) for document in given):
        raise InputError("fold: got calibration that is no text; needed a list of documents, each a str.")
    return given


def text_windows(
    model: PreTrainedModel, recipe: Recipe, tokenizer: Any, documents: list[str] | None, tokens: int | None
) -> Tensor | None:
    """Calibration windows, shape (windows, length)."""
    if documents is None:
        if tokens is not None:
            raise InputError(
                f"fold: calibration_tokens={tokens} has no effect here; it needs calibration text: calibration=[…], or "
                "a recipe with calibrate, and the tokenizer."
            )
        return None
    check_types("fold", calibration_tokens=(tokens, int | None))
    settings = recipe.calibrate or CalibrateSettings()
    limit = context_length(model.config)
    windows = calibration_windows(tokenizer, documents, tokens or settings.tokens, limit)
    check_ids(model, windows, "calibration", tokenizer)
    return windows


def text_prefix(tokenizer: Any, documents: list[str] | None) -> tuple[int, ...]:
    """Token ids that every calibration window begins with."""
    return () if documents is None else prefix_of(tokenizer)


def checked_plan(model: PreTrainedModel, recipe: Recipe, calibrated: bool) -> Plan:
    """The plan, after finding whatever is wrong with recipe and weights before the model is touched."""
    planned = plan(model, recipe)
    available = matrices(model)
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
    for matrix in chosen.values():
        if matrix.parameter.is_meta:
            raise InputError(f"{matrix.name}: has no weights (meta device); load the model's weights first.")
        if not torch.isfinite(matrix.parameter.detach()).all():
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
    try:
        method.check(planned.modules[name], calibrated)
    except InputError as error:
        raise type(error)(f"{name}: {error}") from None


def token_counts_of(
    model: PreTrainedModel, planned: Plan, tokenizer: Any, documents: list[str] | None
) -> Tensor | None:
    """How often the text uses each token, shape (vocabulary,), where a method asks for it."""
    table = next((name for name, matrix in matrices(model).items() if matrix.group == "embedding"), None)
    method = planned.methods.get(table or "")
    if documents is None or method is None or not (method.fits_text or method.token_order == "frequency"):
        return None
    return token_counts(tokenizer, documents, planned.modules[table or ""].out_features)


def identity_of(recipe: Recipe) -> str:
    """What of a recipe decides the result of a fold."""
    return repr((recipe.fold, recipe.layers, recipe.untie))


def identity(
    model: PreTrainedModel, recipe: Recipe, windows: Tensor | None, counts: Tensor | None
) -> dict[str, object]:
    """All that decides the result of a fold, by name."""
    given: dict[str, object] = {
        "recipe": identity_of(recipe),
        "calibration text": [None if given is None else hash_tensor(given) for given in (windows, counts)],
        "configuration": describe_configuration(model.config),
    }
    return {**given, **{name: hash_tensor(tensor) for name, tensor in saved_tensors(model)}}


def key_of(given: dict[str, object]) -> str:
    """A hash of an identity."""
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()


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
