"""The choice of a learning rate: a short run from the same weights with each, judged by validation."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tensorfold.errors import InputError, TensorfoldError
from tensorfold.healing.trainer import own_tensors
from tensorfold.utils.atomic_files import write_file

if TYPE_CHECKING:
    from tensorfold.healing.run import Run

_SHARE, _FEWEST = 20, 20  # a short run has one step in so many of the whole one's, and so many at least


def with_best_rate(run: Run) -> Run:
    """The run with the rate of ``lr_sweep`` that is best after a short run; the run itself where there is no sweep.

    Every short run ends its own schedule, starts from the weights that the model has now, and is forgotten but for its
    validation loss, which is kept in ``sweep.json`` of the working directory: a sweep that was killed goes on with the
    rate that it was at. A rate with which the loss is not finite is worse than any other.

    Raises:
        InputError: There is nothing to validate on, or several processes train.
        TensorfoldError: The loss was not finite with any rate.
    """
    settings = run.settings
    if not settings.lr_sweep:
        return run
    if run.state.num_processes > 1:
        raise InputError("heal: lr_sweep with several processes; sweep with one, then give the best rate as lr.")
    if run.validation is None:
        raise InputError("heal: lr_sweep needs a validation split; give more text, or validation_fraction above 0.")
    file = run.work / "sweep.json"
    losses: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for rate in settings.lr_sweep:
        if f"{rate:g}" not in losses:
            losses[f"{rate:g}"] = _loss_after(run, rate, run.work / f"sweep-{rate:g}")
            write_file(file, json.dumps(losses).encode())
    best = min(settings.lr_sweep, key=lambda rate: losses[f"{rate:g}"])
    if math.isinf(losses[f"{best:g}"]):
        raise TensorfoldError(
            f"heal: the loss is not finite with any of lr_sweep={list(settings.lr_sweep)}; lower them."
        )
    if run.log is not None:
        run.log.write_once({"stage": "sweep", "step": 0, "losses": losses, "lr": best})
    chosen = copy.copy(run)
    chosen.settings = dataclasses.replace(settings, lr=best, lr_sweep=())
    return chosen


def _loss_after(run: Run, rate: float, work: Path) -> float:
    """Validation loss after a short run with a rate; infinite where it is not finite. The model's weights come back."""
    steps = min(run.settings.steps, max(_FEWEST, run.settings.steps // _SHARE))
    short = copy.copy(run)
    short.settings = dataclasses.replace(
        run.settings,
        lr=rate,
        lr_sweep=(),
        steps=steps,
        warmup=min(run.settings.warmup, max(1, steps // 10)),
        evaluate_every=steps,
        save_every=steps,
        select="last",
        patience=None,
        blockwise_tokens=0,
    )
    short.work, short.log = work, None
    work.mkdir(exist_ok=True)
    before = {name: tensor.clone() for name, tensor in own_tensors(run.model).items()}
    try:
        *_, loss, _ = short.end_to_end()
    except InputError:
        raise
    except TensorfoldError:  # the loss became NaN
        loss = None
    finally:
        run.model.load_state_dict(before, strict=False)
        shutil.rmtree(work, ignore_errors=True)
    return loss if loss is not None and math.isfinite(loss) else math.inf
