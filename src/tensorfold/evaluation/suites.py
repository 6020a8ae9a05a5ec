"""Suites: several texts by their protocols, and tasks of lm-evaluation-harness, as one evaluation of a model."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tensorfold.data.texts import describe, in_form, load_text
from tensorfold.errors import InputError
from tensorfold.evaluation.lm_eval import HarnessEvaluation, evaluate_tasks
from tensorfold.evaluation.perplexity import evaluate
from tensorfold.evaluation.protocols import HARNESS, form_needed
from tensorfold.evaluation.result import Evaluation
from tensorfold.utils.validation import nearest

# YAML files of the tasks named ``…_local``, whose data are ``tasks/….jsonl`` in the directory TENSORFOLD_DATA.
TASKS = Path(__file__).with_name("tasks")


@dataclass(frozen=True)
class Suite:
    """What a model is judged by.

    Attributes:
        texts: Protocol by name of a text, of which the test split is read.
        max_tokens: How many tokens of each text; None for all.
        tasks: Most documents by name of a task; None for all.
    """

    texts: Mapping[str, str]
    max_tokens: int | None
    tasks: Mapping[str, int | None]


_TEXTS = {"wikitext-2": "hf-1024", "tinyshakespeare": "hf-1024", "python-docs": "hf-1024", "lambada": "lambada"}
SUITES: Mapping[str, Suite] = {
    "quick": Suite(_TEXTS, 8192, {"hellaswag_local": 250, "piqa_local": 250, "blimp_local": None}),
    "full": Suite(_TEXTS, None, dict.fromkeys(("hellaswag_local", "piqa_local", "blimp_local"))),
}


@dataclass(frozen=True)
class SuiteResult:
    """The evaluations of a suite.

    Attributes:
        suite: Its name.
        rows: Evaluations, texts first.
        skipped: Why not, by the name of a text or task that is not among them.
        seconds: Wall time.
    """

    suite: str
    rows: list[Evaluation]
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; ``rows`` as :meth:`Evaluation.to_dict` gives each."""
        first = self.rows[0]
        return {
            "suite": self.suite,
            "rows": [row.to_dict() for row in self.rows],
            "skipped": self.skipped,
            "parameters": first.parameters,
            "bytes": first.bytes,
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        cells = [("text or task", "protocol", "tokens", "result"), *(_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in cells) for column in range(3)]
        lines = [
            f"{name:<{widths[0]}}  {protocol:<{widths[1]}}  {tokens:>{widths[2]}}  {result}"
            for name, protocol, tokens, result in cells
        ]
        first = self.rows[0]
        lines.append(f"({first.parameters:,} parameters, {first.bytes / 1e6:.1f} MB, {first.dtype}, {first.device})")
        return "\n".join([*lines, *(f"not run: {name}: {why}" for name, why in self.skipped.items())])


def find_suite(name: str) -> Suite:
    """A suite by its name.

    Raises:
        InputError: There is none of that name.
    """
    if name not in SUITES:
        raise InputError(f"unknown suite {name!r}; {nearest(name, SUITES)}")
    return SUITES[name]


def evaluate_suite(
    model: Any, tokenizer: Any, name: str = "quick", *, progress: Callable[[str], None] | None = None
) -> SuiteResult:
    """Judge a model by every text and task of a suite that this machine has.

    Args:
        model: As :func:`~tensorfold.evaluation.perplexity.evaluate` takes it.
        tokenizer: The model's tokenizer.
        name: ``quick``: the first 8,192 tokens of wikitext-2, Tiny Shakespeare, LAMBADA and Python's documentation, 250
            items of HellaSwag and of PIQA, and BLiMP; ``full``: all of them whole.
        progress: Called with the name of each text and task before it is run.

    Raises:
        InputError: There is no such suite, or none of its texts and tasks can be run; of what cannot be run alone
            ``skipped`` says why.
        TensorfoldError: As of the two functions that evaluate.
    """
    suite, start = find_suite(name), time.perf_counter()
    runs: dict[str, Callable[[], Evaluation]] = {
        text: partial(_text, model, tokenizer, text, protocol, suite.max_tokens)
        for text, protocol in suite.texts.items()
    }
    runs |= {task: partial(_task, model, tokenizer, task, limit) for task, limit in suite.tasks.items()}
    rows: list[Evaluation] = []
    skipped: dict[str, str] = {}
    for what, run in runs.items():
        if progress is not None:
            progress(what)
        try:
            rows.append(run())
        except InputError as error:
            skipped[what] = str(error)
    if not rows:
        what, why = next(iter(skipped.items()))
        raise InputError(f"suite {name}: nothing of it can be run, beginning with {what}: {why}")
    return SuiteResult(name, rows, skipped, time.perf_counter() - start)


def _text(model: Any, tokenizer: Any, text: str, protocol: str, max_tokens: int | None) -> Evaluation:
    """One text by its protocol."""
    name = in_form(text, form_needed(protocol))
    return evaluate(model, tokenizer, load_text(name), protocol, max_tokens=max_tokens, text_name=describe(name))


def _task(model: Any, tokenizer: Any, task: str, limit: int | None) -> Evaluation:
    """One task of the harness.

    Raises:
        InputError: The model, the harness or the task's data are not there for it.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError("lm-evaluation-harness runs models in PyTorch; needed the directory before its export.")
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("needs the package lm-eval: pip install 'tensorfold[lm-eval]'.")
    data = Path(os.environ.get("TENSORFOLD_DATA", "."), "tasks", f"{task.removesuffix('_local')}.jsonl")
    if not data.is_file():
        raise InputError(f"its data are not there: needed {data}, in the directory that TENSORFOLD_DATA names.")
    return evaluate_tasks(model, tokenizer, [task], include_path=TASKS, limit=limit)


def _cells(row: Evaluation) -> tuple[str, str, str, str]:
    """A line of the table."""
    if isinstance(row, HarnessEvaluation):
        [(_, metrics)] = row.results.items()
        found = [
            f"{name} {value:.3f} ± {metrics[f'{name}_stderr']:.3f}"
            for name, value in metrics.items()
            if f"{name}_stderr" in metrics
        ]
        return row.text, HARNESS, f"{row.tokens:,}", ", ".join(found)
    interval = "" if row.interval is None else f" [{row.interval[0]:,.2f}, {row.interval[1]:,.2f}]"
    result = f"perplexity {row.perplexity:,.2f}{interval}, accuracy {row.accuracy:.1%}"
    return row.text, row.protocol, f"{row.tokens:,}", result
