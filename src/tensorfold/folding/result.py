"""What a fold reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from tensorfold.algebra.specs.structure import Structure
from tensorfold.folding.budgets import Choice
from tensorfold.folding.plan import Plan


@dataclass(frozen=True)
class FoldReport:
    """What a fold did: the plan, each module's relative error, the metric it is measured in, and the time it took.

    ``errors``: ``‖(W − Ŵ) C^½‖ / ‖W C^½‖`` with C the second moment of the module's inputs where it was calibrated
    (``metrics[name] == "activation"``), the identity where not (``"weight"``). Of a layer that shares a budget,
    ``‖G^½ (W − Ŵ) C^½‖ / ‖G^½ W C^½‖`` with G the second moment of the loss's gradient at its outputs, and W what it
    was fitted to (``"loss"``, see ``calibration.error_feedback``). Of a table that was fitted to text, in the metrics
    of that fit (``"text"``, see ``Statistics.metrics``).

    ``calibration_window``: tokens in each calibration window, the ``calibration_prefix`` that the tokenizer puts before
    a document included; 0 and none where the fold was data-free.

    ``refined``: by block, the relative error of its output on windows that were not stepped on, before and after.

    ``choices``: what a search gave each layer that shared a budget, and its error at other sizes.
    """

    plan: Plan
    errors: dict[str, float]
    metrics: dict[str, str]
    calibration_tokens: int
    seconds: float
    choices: dict[str, Choice] = field(default_factory=dict)
    calibration_window: int = 0
    calibration_prefix: tuple[int, ...] = ()
    refined: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def parameters_before(self) -> int:
        return self.plan.parameters_before

    @property
    def parameters_after(self) -> int:
        return self.plan.parameters_after

    @property
    def bytes_before(self) -> int:
        return self.plan.bytes_before

    @property
    def bytes_after(self) -> int:
        return self.plan.bytes_after

    @property
    def modules(self) -> dict[str, Structure]:
        return self.plan.modules

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: the plan's, with ``error`` and ``metric`` for every module."""
        out = self.plan.to_dict()
        for name, module in out["modules"].items():
            module.update(error=self.errors[name], metric=self.metrics[name])
        if self.choices:
            out["choices"] = {name: asdict(choice) for name, choice in self.choices.items()}
        if self.refined:
            out["refined"] = {name: list(errors) for name, errors in self.refined.items()}
        text = {
            "calibration_tokens": self.calibration_tokens,
            "calibration_window": self.calibration_window,
            "calibration_prefix": list(self.calibration_prefix),
        }
        return {**out, **text, "seconds": round(self.seconds, 3)}

    def __str__(self) -> str:
        kinds = sorted(set(self.metrics.values()))
        return self.plan.table(self.errors, f"{'/'.join(kinds)} error")
