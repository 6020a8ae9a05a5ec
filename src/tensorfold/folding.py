"""Folding: plan, solve, swap, one block after another, in place."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel

from tensorfold.algebra.contract import to_dense
from tensorfold.algebra.solve import relative_error
from tensorfold.algebra.spec import Spec
from tensorfold.anatomy import Matrix, blocks, dense_weight
from tensorfold.calibrate import BlockStream, calibrating, calibration_windows
from tensorfold.errors import InputError, SpecError
from tensorfold.hf.quantizer import mark_folded
from tensorfold.hf.swap import scale_of, swap
from tensorfold.methods import Method
from tensorfold.nn import MPOEmbedding, MPOLinear
from tensorfold.planning import Plan, plan_matrices
from tensorfold.recipe import CalibrateSettings, Recipe
from tensorfold.report import module_table

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoldReport:
    """What a fold did: the plan, each module's relative error, the metric it is measured in, and the time it took.

    ``errors``: ``‖(W − Ŵ) C^½‖ / ‖W C^½‖`` with C the second moment of the module's inputs where it was calibrated
    (``metrics[name] == "activation"``), the identity where not (``"weight"``).
    """

    plan: Plan
    errors: dict[str, float]
    metrics: dict[str, str]
    calibration_tokens: int
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters_before(self) -> int:
        return self.plan.parameters_before

    @property
    def parameters_after(self) -> int:
        return self.plan.parameters_after

    @property
    def modules(self) -> dict[str, Spec]:
        return self.plan.modules

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: the plan's, with ``error`` and ``metric`` for every module."""
        out = self.plan.to_dict()
        for name, module in out["modules"].items():
            module.update(error=self.errors[name], metric=self.metrics[name])
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
    each is measured on the text as the blocks folded before it pass it on, and approximated in the metric of its inputs.
    Embeddings are approximated in the Frobenius norm.

    Args:
        model: A decoder-only transformers model with floating-point weights.
        recipe: A recipe, a method (applied to the MLP), a mapping, a shipped recipe's name or a YAML file.
        tokenizer: The model's; needed with ``calibration``.
        calibration: Documents of calibration text.
        calibration_tokens: How many tokens of it; the recipe's number, else 24,000.
        progress: Show a progress bar on standard error.

    Raises:
        InputError: Model, recipe or text cannot be used. Found before anything is changed, but for NaN or infinity in
            the activations of a later block.
    """
    started = time.monotonic()
    recipe = Recipe.of(recipe)
    planned, chosen = plan_matrices(model, recipe)
    _check_weights(chosen)
    windows = None
    if calibration is not None:
        if tokenizer is None:
            raise InputError("fold: got calibration text without a tokenizer; needed the model's tokenizer.")
        tokens = calibration_tokens or (recipe.calibrate or CalibrateSettings()).tokens
        documents = [calibration] if isinstance(calibration, str) else calibration
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        windows = calibration_windows(tokenizer, documents, tokens, limit)

    errors: dict[str, float] = {}
    bar = _progress(progress)
    task = bar.add_task("", total=len(chosen))
    with bar, calibrating(model):
        for matrix, metric in _in_order(model, chosen, windows):
            bar.update(task, description=matrix.name)
            errors[matrix.name] = _fold_one(model, matrix, planned, metric)
            bar.advance(task)
    mark_folded(model, planned.modules, {m.name: m.tied_head for m in chosen.values() if m.tied_head is not None})
    calibrated = windows is not None
    return FoldReport(
        planned,
        errors={name: errors[name] for name in planned.modules},
        metrics={n: "activation" if calibrated and m.kind == "linear" else "weight" for n, m in chosen.items()},
        calibration_tokens=windows.numel() if windows is not None else 0,
        seconds=time.monotonic() - started,
    )


def _check_weights(chosen: Mapping[str, Matrix]) -> None:
    for matrix in chosen.values():
        if matrix.parameter.is_meta:
            raise InputError(f"{matrix.name}: has no weights (meta device); load the model's weights first.")
        if not torch.isfinite(matrix.parameter).all():
            raise InputError(f"{matrix.name}: its weight holds NaN or infinity; repair the checkpoint or exclude it.")
        if matrix.kind == "embedding":
            scale_of(matrix)


def _in_order(
    model: PreTrainedModel, chosen: Mapping[str, Matrix], windows: Tensor | None
) -> Iterator[tuple[Matrix, Tensor | None]]:
    """Every matrix with its metric; the caller folds each before the next one is asked for."""
    if windows is None:
        yield from ((matrix, None) for matrix in chosen.values())
        return
    prefix, chain = blocks(model)
    inside: dict[int, dict[str, Matrix]] = {}
    outside: dict[str, Matrix] = {}
    for name, matrix in chosen.items():
        if matrix.kind == "embedding":
            yield matrix, None
        elif name.startswith(f"{prefix}."):
            inside.setdefault(int(name.removeprefix(f"{prefix}.").partition(".")[0]), {})[name] = matrix
        else:
            outside[name] = matrix
    stream = BlockStream(model, windows)
    for index in range(max(inside, default=-1) + 1):
        matrices = inside.get(index, {})
        if matrices:
            moments = stream.moments(index, {name: matrix.module for name, matrix in matrices.items()})
            yield from ((matrix, moments.pop(name)) for name, matrix in matrices.items())
        if index < max(inside):
            stream.advance(index)
    del stream.hidden
    if outside:
        moments = stream.outside({name: matrix.module for name, matrix in outside.items()})
        yield from ((matrix, moments.pop(name)) for name, matrix in outside.items())


def _fold_one(model: PreTrainedModel, matrix: Matrix, planned: Plan, metric: Tensor | None) -> float:
    spec, method = planned.modules[matrix.name], planned.methods[matrix.name]
    weight = dense_weight(matrix.module).detach()
    try:
        cores, scalars = method.solve(weight, spec, metric)
    except SpecError as error:
        raise SpecError(f"{matrix.name}: {error}") from None
    folded: MPOLinear | MPOEmbedding
    if matrix.kind == "embedding":
        folded = MPOEmbedding.from_cores(cores, spec, weight, scale_of(matrix), scalars)
    else:
        folded = MPOLinear.from_cores(cores, spec, weight, matrix.bias, scalars)
    swap(model, matrix, folded)
    return relative_error(weight, to_dense([core.double() for core in folded.factors()], spec), metric)


def _progress(visible: bool) -> Progress:
    return Progress(
        TextColumn("fold"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        disable=not visible,
        transient=True,
    )
