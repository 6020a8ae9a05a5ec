"""Folding: plan, solve, swap, one block after another, in place."""

from __future__ import annotations

import hashlib
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tensorfold.algebra.any_spec import AnySpec
from tensorfold.algebra.permutation import search_row_order
from tensorfold.algebra.solve import relative_error
from tensorfold.algebra.spec import Spec
from tensorfold.algebra.statistics import Metrics, Statistics
from tensorfold.anatomy import Matrix, check_foldable, dense_weight, matrices
from tensorfold.batches import Text, batches
from tensorfold.calibrate import calibrating, calibration_windows, token_counts
from tensorfold.errors import InputError, SpecError
from tensorfold.hf.quantizer import mark_folded
from tensorfold.hf.swap import empty_module, scale_of, solved_module, swap
from tensorfold.memory import release_file_pages
from tensorfold.method import NOTHING
from tensorfold.methods import Method
from tensorfold.nn import MPOLinear
from tensorfold.planning import Plan, plan, prepare
from tensorfold.ranks import Ranks
from tensorfold.recipe import Recipe
from tensorfold.report import module_table, progress_bar
from tensorfold.search import Choice, Search, search
from tensorfold.settings import CalibrateSettings
from tensorfold.surgery import HiddenUnits, hidden_units, reorder_hidden
from tensorfold.texts import load_text

log = logging.getLogger(__name__)

# Travels from rank to rank beside the state of a solved module.
_ERROR = "relative error"


@dataclass(frozen=True)
class FoldReport:
    """What a fold did: the plan, each module's relative error, the metric it is measured in, and the time it took.

    ``errors``: ``‖(W − Ŵ) C^½‖ / ‖W C^½‖`` with C the second moment of the module's inputs where it was calibrated
    (``metrics[name] == "activation"``), the identity where not (``"weight"``). Of a layer that shares a budget,
    ``‖G^½ (W − Ŵ) C^½‖ / ‖G^½ W C^½‖`` with G the second moment of the loss's gradient at its outputs, and W what it
    was fitted to (``"loss"``, see ``feedback``). Of a table that was fitted to text, in the metrics of that fit
    (``"text"``, see ``Statistics.metrics``).

    ``choices``: what a search gave each layer that shared a budget, and its error at other sizes.
    """

    plan: Plan
    errors: dict[str, float]
    metrics: dict[str, str]
    calibration_tokens: int
    seconds: float
    choices: dict[str, Choice] = field(default_factory=dict)

    @property
    def parameters_before(self) -> int:
        return self.plan.parameters_before

    @property
    def parameters_after(self) -> int:
        return self.plan.parameters_after

    @property
    def modules(self) -> dict[str, AnySpec]:
        return self.plan.modules

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: the plan's, with ``error`` and ``metric`` for every module."""
        out = self.plan.to_dict()
        for name, module in out["modules"].items():
            module.update(error=self.errors[name], metric=self.metrics[name])
        if self.choices:
            out["choices"] = {name: asdict(choice) for name, choice in self.choices.items()}
        return {**out, "calibration_tokens": self.calibration_tokens, "seconds": round(self.seconds, 3)}

    def __str__(self) -> str:
        kinds = sorted(set(self.metrics.values()))
        return module_table(
            self.modules,
            self.parameters_before,
            self.parameters_after,
            self.plan.kept,
            self.errors,
            f"{'/'.join(kinds)} error",
            self.plan.warnings,
        )


def fold(
    model: PreTrainedModel,
    recipe: Recipe | Method | Mapping[str, Any] | str | Path,
    tokenizer: Any = None,
    calibration: Iterable[str] | None = None,
    *,
    calibration_tokens: int | None = None,
    progress: bool = False,
) -> FoldReport:
    """Replace the targeted weights of ``model`` by matrix product operators, in place.

    Without calibration text each matrix is approximated in the Frobenius norm. With it, the blocks are taken in order;
    each is measured on the text as the blocks folded before it pass it on, and fitted in the metric of its inputs.
    The rows of the input table weigh by how often all of the text uses their tokens, and are fitted to what errors cost
    where they enter (gradients of the loss) and in a tied head (the states that it reads), before anything else is
    folded; ``token-mps`` looks at none of it.

    Under ``torchrun`` every rank has to call this with the same model, recipe and text, and is left with the same
    folded model. Each matrix is solved by one rank; activations are computed by all of them. On equal machines with
    equally many threads (``torchrun`` sets ``OMP_NUM_THREADS=1`` if it is not set) the result does not depend on the
    number of ranks, to the last bit; on unequal ones it is still the same model on every rank.

    Args:
        model: A decoder-only transformers model with floating-point weights.
        recipe: A recipe, a method (applied to the MLP), a mapping, a shipped recipe's name or a YAML file.
        tokenizer: The model's; needed with ``calibration``.
        calibration: Documents of calibration text; None takes the text that the recipe names, if it names one.
        calibration_tokens: How many tokens of it; the recipe's number, else 24,000.
        progress: Show a progress bar on standard error, on the first rank.

    Raises:
        InputError: Model, recipe or text cannot be used, or are not the same on every rank. Found before anything is
            changed, but for NaN or infinity in activations and gradients.
        Exception: What another rank raised, on all of them.
    """
    started = time.monotonic()
    check_foldable(model)
    ranks = Ranks.find(cpu=model.device.type in ("cpu", "meta"))
    with ranks.together():
        recipe = Recipe.of(recipe)
        documents = _documents(recipe, tokenizer, calibration)
        windows = _windows(model, recipe, tokenizer, documents, calibration_tokens)
        counts = _counts(model, _check(model, recipe, windows is not None), tokenizer, documents)
        _check_same(ranks, model, recipe, windows, counts)
        planned, chosen = prepare(model, recipe)
        planned, found, errors = _fold_all(
            ranks, model, planned, chosen, Text(windows, counts), progress and ranks.is_first
        )
        chosen = {name: matrix for name, matrix in chosen.items() if name in planned.modules}
        if chosen:
            tied = {matrix.name: matrix.tied_head for matrix in chosen.values() if matrix.tied_head is not None}
            mark_folded(model, planned.modules, tied, planned.split)

    def metric(matrix: Matrix) -> str:
        if windows is None or (matrix.kind == "embedding" and (counts is None or matrix.group != "embedding")):
            return "weight"
        if matrix.kind == "embedding":
            return "text" if planned.methods[matrix.name].fits_text else "weight"
        return "loss" if matrix.name in found.efforts else "activation"

    return FoldReport(
        planned,
        errors={name: errors[name] for name in planned.modules},
        metrics={name: metric(matrix) for name, matrix in chosen.items()},
        calibration_tokens=windows.numel() if windows is not None else 0,
        seconds=time.monotonic() - started,
        choices=found.choices,
    )


def _documents(recipe: Recipe, tokenizer: Any, calibration: Iterable[str] | None) -> list[str] | None:
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
    return [calibration] if isinstance(calibration, str) else list(calibration)


def _windows(
    model: PreTrainedModel, recipe: Recipe, tokenizer: Any, documents: list[str] | None, tokens: int | None
) -> Tensor | None:
    """Calibration windows, shape (windows, length)."""
    if documents is None:
        return None
    settings = recipe.calibrate or CalibrateSettings()
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return calibration_windows(tokenizer, documents, tokens or settings.tokens, limit)


def _check(model: PreTrainedModel, recipe: Recipe, calibrated: bool) -> Plan:
    """The plan, after finding whatever is wrong with recipe and weights before the model is touched."""
    planned = plan(model, recipe)
    available = matrices(model)
    for name, method in planned.methods.items():
        # Of tables, text knows the one that it goes in by, and none of positions.
        known = name not in available or available[name].kind == "linear" or available[name].group == "embedding"
        try:
            method.check(planned.modules[name], calibrated and known)
        except InputError as error:
            raise type(error)(f"{name}: {error}") from None
    chosen = available if recipe.changes_modules else {name: available[name] for name in planned.modules}
    for matrix in chosen.values():
        if matrix.parameter.is_meta:
            raise InputError(f"{matrix.name}: has no weights (meta device); load the model's weights first.")
        if not torch.isfinite(matrix.parameter).all():
            raise InputError(f"{matrix.name}: its weight holds NaN or infinity; repair the checkpoint or exclude it.")
        if matrix.kind == "embedding" and matrix.name in planned.modules:
            scale_of(matrix)
    return planned


def _counts(model: PreTrainedModel, planned: Plan, tokenizer: Any, documents: list[str] | None) -> Tensor | None:
    """How often the text uses each token, shape (vocabulary,), where a method asks for it."""
    table = next((name for name, matrix in matrices(model).items() if matrix.group == "embedding"), None)
    method = planned.methods.get(table or "")
    if documents is None or method is None or not (method.fits_text or method.token_order == "frequency"):
        return None
    return token_counts(tokenizer, documents, planned.modules[table or ""].out_features)


def _check_same(
    ranks: Ranks, model: PreTrainedModel, recipe: Recipe, windows: Tensor | None, counts: Tensor | None
) -> None:
    """Find out before the model is touched if the ranks would fold different models into one."""
    if ranks.count == 1:
        return
    given: dict[str, object] = {
        "recipe": repr((recipe.fold, recipe.layers, recipe.untie)),
        "calibration text": [
            None if given is None else hashlib.sha256(given.numpy().tobytes()).hexdigest()
            for given in (windows, counts)
        ],
    }
    for name, parameter in model.named_parameters():
        given[name] = parameter.shape if parameter.is_meta else torch.hash_tensor(parameter).item()
    first, *others = ranks.gather(given)
    for rank, other in enumerate(others, start=1):
        different = [what for what in {**first, **other} if first.get(what) != other.get(what)]
        if different:
            raise InputError(
                f"fold: {different[0]} of rank {rank} is not that of rank 0; needed the same model, recipe and text on "
                "every rank. Give all of them the same files."
            )


def _fold_all(
    ranks: Ranks,
    model: PreTrainedModel,
    planned: Plan,
    chosen: Mapping[str, Matrix],
    text: Text,
    progress: bool,
) -> tuple[Plan, Search, dict[str, float]]:
    """Solve and replace every chosen matrix; the plan as it was carried out, and the relative error of each."""
    errors: dict[str, float] = {}
    bar = progress_bar("fold", progress)
    task = bar.add_task("", total=len(chosen))
    found = Search()

    def works_on(what: str) -> None:
        bar.update(task, description=what)
        log.debug("rank %d of %d: %s", ranks.index, ranks.count, what)

    with bar, calibrating(model):
        if text.windows is not None and planned.budgets:
            planned, found = search(model, planned, chosen, text.windows, works_on)
            chosen = {name: matrix for name, matrix in chosen.items() if name in planned.modules}
            bar.update(task, total=len(chosen))
        for batch, known in batches(model, chosen, planned, text, found):
            known = _align_hidden_units(ranks, model, batch, planned, known, works_on)

            def solve(matrix: Matrix, known: dict[str, Statistics] = known) -> dict[str, Tensor]:
                works_on(matrix.name)
                return _solve(matrix, planned, known.get(matrix.name, NOTHING))

            def unsolved(matrix: Matrix) -> dict[str, Tensor]:
                return _unsolved(matrix, planned.modules[matrix.name])

            for matrix, solution in ranks.share(batch, _cost, solve, unsolved):
                errors[matrix.name] = solution.pop(_ERROR).item()
                _replace(model, matrix, planned.modules[matrix.name], solution)
                known.pop(matrix.name, None)
                bar.advance(task)
    return planned, found, errors


def _align_hidden_units(
    ranks: Ranks,
    model: PreTrainedModel,
    batch: list[Matrix],
    planned: Plan,
    known: dict[str, Statistics],
    works_on: Callable[[str], None],
) -> dict[str, Statistics]:
    """Reorder the hidden units of MLPs whose method asks for it; the statistics follow them."""

    def wanted(matrix: Matrix) -> bool:
        return getattr(planned.methods.get(matrix.name), "permute", "none") != "none"

    if not any(wanted(matrix) for matrix in batch):
        return known
    names = {matrix.name for matrix in batch}

    def members(units: HiddenUnits) -> list[Matrix]:
        return [m for m in (*units.ups, units.down) if m.name in names and wanted(m)]

    def search(units: HiddenUnits) -> dict[str, Tensor]:
        works_on(f"hidden units of {units.down.name}")
        views = []
        for matrix in members(units):
            weight, spec = dense_weight(matrix.module).detach(), planned.modules[matrix.name]
            assert isinstance(spec, Spec)  # of an MLP's linear layer
            inputs = known.get(matrix.name, NOTHING).inputs
            if inputs is not None:
                weight = weight * inputs.diagonal().sqrt()  # the metric's scale of every input
            views.append((weight.T, spec.transposed) if matrix.name == units.down.name else (weight, spec))
        return {"order": search_row_order(views)[0]}

    def unknown(units: HiddenUnits) -> dict[str, Tensor]:
        return {"order": torch.empty(units.down.in_features, dtype=torch.int64)}

    aligned = dict(known)
    families = [units for units in hidden_units(model, matrices(model)) if members(units)]
    for units, found in ranks.share(families, lambda units: units.down.in_features**3, search, unknown):
        order = found["order"]
        reorder_hidden(units, order.to(units.down.parameter.device))
        for matrix in (*units.ups, units.down):
            if matrix.name in aligned:
                sides = {"columns": order} if matrix is units.down else {"rows": order}
                aligned[matrix.name] = aligned[matrix.name].reordered(**sides)
    return aligned


def _cost(matrix: Matrix) -> int:
    """Multiply–adds of a decomposition, up to a constant."""
    return matrix.parameter.numel() * min(matrix.out_features, matrix.in_features)


def _solve(matrix: Matrix, planned: Plan, known: Statistics) -> dict[str, Tensor]:
    """The state of the module that replaces the matrix, and the relative error."""
    spec, method = planned.modules[matrix.name], planned.methods[matrix.name]
    weight = dense_weight(matrix.module).detach() if known.target is None else known.target
    try:
        factors = method.solve(weight, spec, known)
    except SpecError as error:
        raise SpecError(f"{matrix.name}: {error}") from None
    folded = solved_module(matrix, spec, factors)
    if known.means is not None and isinstance(folded, MPOLinear) and folded.bias is not None:
        given, wanted = known.means
        folded.bias.data += (wanted - folded.to_dense(torch.float32) @ given).to(folded.bias.dtype)
    metrics = known.metrics() if matrix.kind == "linear" or method.fits_text else Metrics()
    reached = relative_error(weight, folded.to_dense(torch.float64), *metrics)
    return {**folded.state_dict(), _ERROR: torch.tensor(reached, dtype=torch.float64)}


def _unsolved(matrix: Matrix, spec: AnySpec) -> dict[str, Tensor]:
    """Uninitialised memory for what :func:`_solve` returns."""
    state = empty_module(matrix, spec).to_empty(device=matrix.parameter.device).state_dict()
    return {**state, _ERROR: torch.empty((), dtype=torch.float64)}


def _replace(model: PreTrainedModel, matrix: Matrix, spec: AnySpec, state: dict[str, Tensor]) -> None:
    folded = empty_module(matrix, spec)
    folded.load_state_dict(state, assign=True)
    folded.requires_grad_(matrix.parameter.requires_grad)
    swap(model, matrix, folded)
    release_file_pages(dense_weight(matrix.module))
