"""Protocol ``lm-eval``: EleutherAI's lm-evaluation-harness on a loaded model, through its own Python API."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from tensorfold.errors import InputError, TensorfoldError, pass_on_memory
from tensorfold.evaluation.perplexity import Evaluation
from tensorfold.evaluation.protocols import HARNESS
from tensorfold.hf.loading import reason
from tensorfold.models.modes import evaluation_mode
from tensorfold.models.sizes import stored_bytes

_PERPLEXITIES = ("word_perplexity", "perplexity")


@dataclass(frozen=True)
class HarnessEvaluation(Evaluation):
    """What the harness found. ``perplexity`` and ``accuracy`` are of one task: the first with a perplexity, or else the
    first; None where it has none.

    Args:
        results: For every task and group its metrics, under the harness's own names.
        versions: Of the tasks, and under ``lm_eval`` of the harness: other versions may measure something else.
    """

    perplexity: float | None  # type: ignore[assignment]
    accuracy: float | None  # type: ignore[assignment]
    results: dict[str, dict[str, float]] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{task}: {name} {value:.6g}" for task, found in self.results.items() for name, value in found.items()]
        version = self.versions.get("lm_eval")
        return "\n".join([*lines, f"({HARNESS} {version}, {self.tokens:,} tokens, {self.parameters:,} parameters)"])


def check_tasks(tasks: Sequence[str] | None, include_path: str | Path | None, limit: int | None) -> list[str]:
    """The tasks to run, if they can be asked for: for calling it before a model is loaded.

    Raises:
        InputError: There are none, the harness is not installed, or ``include_path`` is no directory.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks or ())
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise InputError(f"protocol {HARNESS}: got tasks={tasks!r}; needed some, such as wikitext,lambada_openai.")
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            f"protocol {HARNESS} needs the package lm-eval, which is not installed; run: "
            "pip install 'tensorfold[lm-eval]'"
        )
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"include path {str(include_path)!r}: no such directory; needed one with YAML files of tasks.")
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit}: needed at least 1 document a task.")
    return [name.strip() for name in names]


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 1,
) -> HarnessEvaluation:
    """Run tasks of lm-evaluation-harness on a model where it lies and in its own dtype.

    Offline it runs whatever tasks have their data on this machine: in the ``datasets`` cache, or in local files that a
    YAML of ``include_path`` names. Such a file may name Python functions, which are run: include only what you trust.

    Args:
        model, tokenizer: A causal language model of transformers, folded or not.
        tasks: Names of tasks, groups or tags, as ``lm_eval ls tasks`` lists them.
        include_path: Directory with YAML files of further tasks; they win over the harness's own.
        limit: Only the first this many documents of every task.
        batch_size: Sequences in one forward pass.

    Raises:
        InputError: The harness is not installed, a task is unknown, or its data cannot be had.
        TensorfoldError: The harness failed while working.
    """
    names = check_tasks(tasks, include_path, limit)
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise InputError(f"protocol {HARNESS}: the tokenizer has no bos_token or eos_token; needed one to start by.")
    start = time.perf_counter()
    with _quiet(), evaluation_mode(model):
        import lm_eval
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        class CountingLM(HFLM):  # type: ignore[misc]
            scored = 0

            def _loglikelihood_tokens(self, requests: Any, *args: Any, **options: Any) -> Any:
                self.scored += sum(len(target) for *_, target in requests)
                return super()._loglikelihood_tokens(requests, *args, **options)

        manager = _manager(names, include_path)
        harness = CountingLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        try:
            found = simple_evaluate(harness, tasks=names, task_manager=manager, limit=limit, log_samples=False)
        except TensorfoldError:
            raise
        except Exception as error:
            pass_on_memory(error)
            raise TensorfoldError(
                f"lm-eval failed on {', '.join(names)}: {type(error).__name__}: {reason(error)}; run the tasks on the "
                "dense model to see whose fault it is."
            ) from error
    parameters = list(model.parameters())
    results = {task: _metrics(values) for task, values in {**found["results"], **found.get("groups", {})}.items()}
    judged = next((each for each in results.values() if _perplexity(each) is not None), next(iter(results.values())))
    return HarnessEvaluation(
        perplexity=_perplexity(judged),
        tokens=harness.scored,
        protocol=HARNESS,
        text=",".join(names) if limit is None else f"{','.join(names)} (first {limit} documents)",
        seconds=time.perf_counter() - start,
        parameters=sum(parameter.numel() for parameter in parameters),
        bytes=stored_bytes(model),
        accuracy=judged.get("acc"),
        device=str(parameters[0].device),
        dtype=str(model.dtype).removeprefix("torch."),
        results=results,
        versions={**found["versions"], "lm_eval": getattr(lm_eval, "__version__", None)},
    )


def _manager(names: Sequence[str], include_path: str | Path | None) -> Any:
    """What knows the tasks; the harness's own, thousands of files, are indexed only if a name is not in the directory.

    Raises:
        InputError: A name is known to neither.
    """
    from lm_eval.tasks import TaskManager

    class Manager(TaskManager):  # type: ignore[misc]
        def load(self, task_list: Any) -> Any:
            try:
                return super().load(task_list)
            # Whatever is wrong with a file, its functions or its data set comes out here, as any kind of exception.
            except Exception as error:
                pass_on_memory(error)
                raise InputError(
                    f"lm-eval {', '.join(names)}: cannot be loaded ({reason(_origin(error))}); offline, a task needs "
                    "local data: put a YAML whose data_files are on this machine in a directory and give it as"
                    " include path."
                ) from error

    for defaults in (False, True) if include_path is not None else (True,):
        manager = Manager(include_path=str(include_path) if include_path else None, include_defaults=defaults)
        unknown = [name for name in names if name not in manager.all_tasks]
        if not unknown:
            return manager
    near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "`lm_eval ls tasks` lists them."
    raise InputError(f"lm-eval knows no task {unknown[0]!r}; {hint}")


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among a task's results; ``acc,none`` is the ``acc`` of a task whose outputs no filter changes."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if "," in name and isinstance(value, int | float) and math.isfinite(value)
    }


def _perplexity(metrics: Mapping[str, float]) -> float | None:
    return next((metrics[name] for name in _PERPLEXITIES if name in metrics), None)


def _origin(error: BaseException) -> BaseException:
    """What is wrong with a file: ``datasets`` wraps it in an error that says only that something is.

    Other exceptions are their own best words: what they were raised from (a socket's error) names no task or data set.
    """
    from datasets.exceptions import DatasetGenerationError

    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness off standard output, which is for results, and notices off standard error.

    What ``datasets`` logs of a file that it cannot read is in the exception as well. The harness asks git for the
    commit of the working directory, and git complains on standard error where there is none.
    """
    levels = {logging.getLogger("lm_eval"): logging.ERROR, logging.getLogger("datasets"): logging.CRITICAL}
    before = {logger: logger.level for logger in levels}
    for logger, level in levels.items():
        logger.setLevel(level)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            import lm_eval.evaluator  # inside, for what it prints and logs while it is imported

            with mock.patch.object(lm_eval.evaluator, "get_git_commit_hash", create=True, return_value=None):
                yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)
