"""The log of a healing run (one JSON line a step), its progress bar, and the plot of its losses."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from transformers import TrainerCallback

from tensorfold.utils.atomic_files import write_file
from tensorfold.utils.records import read_lines
from tensorfold.utils.terminal import progress_bar

_WIDTH, _HEIGHT, _MARGIN = 800, 400, 60  # pixels


class StepLog:
    """A file of JSON lines, one for each step and each evaluation, each written once however often a run was killed.

    Args:
        path: The file; one that is there is continued, without a last line that a kill cut short.

    Attributes:
        records: All lines as objects, in order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = read_lines(path)[0]
        self._staged = {_key(record) for record in self.records if "stage" in record}
        self._rewrite()

    def forget_after(self, step: int) -> None:
        """Remove end-to-end lines of steps after ``step``, since a resumed run takes those steps again."""
        self.records = [record for record in self.records if "stage" in record or record["step"] <= step]
        self._rewrite()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line, unless it is of block-by-block healing (has a ``stage``) and is there already."""
        if "stage" in record:
            if _key(record) in self._staged:
                return
            self._staged.add(_key(record))
        self.records.append(dict(record))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def write_once(self, record: Mapping[str, Any]) -> None:
        """Append one line unless an equal one is there: a run that was killed at its end may have written it."""
        if dict(record) not in self.records:
            self.write(record)

    def _rewrite(self) -> None:
        write_file(self.path, "".join(json.dumps(record) + "\n" for record in self.records).encode())


def _key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Identity of a line of block-by-block healing."""
    return tuple(record.get(name) for name in ("stage", "block", "epoch", "step"))


class Reporter(TrainerCallback):
    """A callback of the Trainer on the main process: times the steps, writes the log and moves the progress bar.

    Args:
        log: The log to write.
        tokens: Tokens in a step, over all devices.
        dropout: Probability of dropout, for the log.
        progress: Whether to show a bar on standard error, with loss, tokens a second and time left.
    """

    def __init__(self, log: StepLog, tokens: int, dropout: float, progress: bool) -> None:
        self.log, self.tokens, self.dropout = log, tokens, dropout
        self.bar = progress_bar("heal", progress)
        self._task = self.bar.add_task("", total=None)
        self._started = time.monotonic()
        self._seconds = math.nan

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(self._task, total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._seconds = time.monotonic() - self._started

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "eval_loss" in logs:
            validation = {"validation_loss": logs["eval_loss"], "validation_accuracy": logs["eval_accuracy"]}
            self.log.write({"step": state.global_step, **validation})
        elif "loss" in logs:
            rate = self.tokens / self._seconds
            timing = {
                "tokens": state.global_step * self.tokens,
                "tokens_per_second": round(rate, 1),
                "seconds": round(self._seconds, 4),
            }
            parts = {key: value for key, value in logs.items() if key not in ("epoch", "learning_rate")}
            constant = {"lr": logs["learning_rate"], "dropout": self.dropout}
            self.log.write({"step": state.global_step, **parts, **constant, **timing})
            self.bar.update(
                self._task, completed=state.global_step, description=f"loss {logs['loss']:.3f}, {rate:,.0f} tokens/s"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.stop()


def loss_plot(records: list[dict[str, Any]]) -> str:
    """A plot of a log's losses against steps, as the text of an SVG: a line for training, circles for validation."""
    training = [(r["step"], r["loss"]) for r in records if "loss" in r and "stage" not in r]
    validation = [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]
    points = training + validation
    if not points:
        return f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}"/>\n'
    steps, losses = zip(*points, strict=True)
    x = _axis(min(steps), max(steps), _MARGIN, _WIDTH - _MARGIN)
    y = _axis(min(losses), max(losses), _HEIGHT - _MARGIN, _MARGIN)
    line = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in training)
    circles = "".join(f'<circle cx="{x(step):.1f}" cy="{y(loss):.1f}" r="3"/>' for step, loss in validation)
    labels = [
        (_MARGIN, _HEIGHT - _MARGIN + 20, f"step {min(steps)}"),
        (_WIDTH - 2 * _MARGIN, _HEIGHT - _MARGIN + 20, f"step {max(steps)}"),
        (5, y(max(losses)) + 4, f"{max(losses):.3f}"),
        (5, y(min(losses)) + 4, f"{min(losses):.3f}"),
        (_MARGIN, _MARGIN // 2, "loss: line for training, circles for validation"),
    ]
    texts = "".join(f'<text x="{left:.0f}" y="{top:.0f}">{escape(text)}</text>' for left, top, text in labels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f'<polyline points="{line}" fill="none" stroke="steelblue"/><g fill="darkorange">{circles}</g>{texts}</svg>\n'
    )


def _axis(low: float, high: float, start: float, end: float) -> Any:
    """The linear map from [low, high] to the pixels from ``start`` to ``end``."""
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)
