"""The protocol ``lm-eval``: tasks of EleutherAI's lm-evaluation-harness on a loaded model, by its Python interface."""

from __future__ import annotations

import contextlib
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

from tensorfold.errors import InputError, TensorfoldError, pass_on_memory, reason
from tensorfold.evaluation.protocols import HARNESS
from tensorfold.evaluation.result import Evaluation
from tensorfold.models.modes import evaluation_mode
from tensorfold.models.sizes import stored_bytes
from tensorfold.utils.finite import why_not_finite
from tensorfold.utils.validation import nearest

_PERPLEXITIES = ("word_perplexity", "perplexity")
# Of the logits of one batch. Twice as much is no faster on two cores, and the harness takes the logarithm of them all.
_LOGITS_BYTES = 64 << 20


@dataclass(frozen=True)
class HarnessEvaluation(Evaluation):
    """The result of tasks of lm-evaluation-harness.

    ``perplexity`` and ``accuracy`` come from one task, the first that has a perplexity or else the first, and are None
    where it has none.

    Args:
        results: Metrics of every task and group, by the harness's own names.
        versions: Version of every task, and of the harness under ``lm_eval``; results are comparable only where they
            are equal.
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
    """Check what can be checked before a model is loaded, and return the names of the tasks.

    Args:
        tasks: Names of tasks; one as a string.
        include_path: Directory with YAML files of further tasks.
        limit: Most documents of each task; None for all.

    Raises:
        InputError: No task is named, the harness is not installed, ``include_path`` is no directory, or ``limit`` is
            less than 1.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks or ())
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise InputError(
            f"protocol {HARNESS}: got tasks={tasks!r}; needed names of tasks, such as wikitext,lambada_openai."
        )
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
    batch_size: int | None = None,
) -> HarnessEvaluation:
    """Run tasks of lm-evaluation-harness on a model, on its own device and in its own dtype.

    Likelihoods are added up in float32 whatever the model computes in: in bfloat16 a sum of 100 nats has steps of half
    a nat, and choices would tie.

    Without network only tasks run whose data is on this machine: in the cache of ``datasets``, or in local files that
    a YAML file of ``include_path`` names. Such a file may name Python functions, which are run: include only files that
    you trust.

    Args:
        model: A causal language model of transformers, folded or not.
        tokenizer: Its tokenizer.
        tasks: Names of tasks, groups or tags, as ``lm_eval ls tasks`` lists them.
        include_path: Directory with YAML files of further tasks, which take precedence over the harness's own.
        limit: Most documents of each task, from its beginning; None for all.
        batch_size: Sequences in one forward pass; None for as many as have 64 MiB of logits together, at least one.

    Raises:
        InputError: The harness is not installed, a task is unknown, or its data cannot be loaded.
        TensorfoldError: The harness failed while it ran the tasks, or the model's logits are NaN.
    """
    names = check_tasks(tasks, include_path, limit)
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise InputError(
            f"protocol {HARNESS}: the tokenizer has no bos_token or eos_token; needed one to begin a text with."
        )
    start = time.perf_counter()
    with _quiet(), evaluation_mode(model):
        import lm_eval
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        class CountingLM(HFLM):  # type: ignore[misc]
            scored = 0
            first = 0  # of the batch that is being gathered, among the requests in the order of their lengths

            # The two ways in which the harness asks for a batch size of "auto". Its own try forward passes until one
            # does not fit, which on a processor ends the process.
            def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
                return max(1, _positions(model) // self.max_length)

            def _batch_scheduler(self, pos: int, requests: Any) -> int:
                """How many make a batch, asked as each request joins one; 0 while there is room for another."""
                self.first = min(self.first, pos) if pos else 0
                rows = pos + 1 - self.first
                _, context, continuation = requests[self.first]  # the longest
                if (rows + 1) * (len(context) + len(continuation)) <= _positions(model):
                    return 0
                self.first = pos + 1
                return rows

            def _loglikelihood_tokens(self, requests: Any, *args: Any, **options: Any) -> Any:
                self.scored += sum(len(target) for *_, target in requests)
                found = super()._loglikelihood_tokens(requests, *args, **options)
                # Among NaN the harness would take the first choice for the likeliest, and call that an accuracy.
                if any(math.isnan(likelihood) for likelihood, *_ in found):
                    raise TensorfoldError(f"lm-eval: the model's logits are not numbers; {why_not_finite(model)}.")
                return found

        manager = _manager(names, include_path)
        harness = CountingLM(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size or "auto", softmax_dtype="float32"
        )
        try:
            found = simple_evaluate(harness, tasks=names, task_manager=manager, limit=limit, log_samples=False)
        except TensorfoldError:
            raise
        except Exception as error:
            pass_on_memory(error)
            raise TensorfoldError(
                f"lm-eval failed on {', '.join(names)}: {type(error).__name__}: {reason(error)}; run the tasks on the "
                "dense model to see whether they fail there too."
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
    """The harness's task manager for these tasks.

    The harness's own tasks, thousands of files, are indexed only where ``include_path`` lacks one of the names.

    Raises:
        InputError: A name is in neither place.
    """
    from lm_eval.tasks import TaskManager

    class Manager(TaskManager):  # type: ignore[misc]
        def load(self, task_list: Any) -> Any:
            try:
                return super().load(task_list)
            # A bad file, its functions and its data set fail here, with any kind of exception.
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
    hint = nearest(unknown[0], manager.all_tasks, otherwise="`lm_eval ls tasks` lists them.")
    raise InputError(f"lm-eval knows no task {unknown[0]!r}; {hint}")


def _positions(model: Any) -> int:
    """How many tokens make the logits of a batch, in float32, as large as they may be."""
    return _LOGITS_BYTES // (4 * model.config.get_text_config().vocab_size)


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among a task's results.

    The harness names them ``METRIC,FILTER``; the suffix is dropped where the filter is ``none``.
    """
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if "," in name and isinstance(value, int | float) and math.isfinite(value)
    }


def _perplexity(metrics: Mapping[str, float]) -> float | None:
    """A task's perplexity, by word where it has several; None where it has none."""
    return next((metrics[name] for name in _PERPLEXITIES if name in metrics), None)


def _origin(error: BaseException) -> BaseException:
    """The exception with the most telling message.

    ``datasets`` wraps a fault of a file in an error that says only that there is one, so its cause is returned. Other
    exceptions are returned as they are: their causes, such as a socket's error, name no task or data set.
    """
    from datasets.exceptions import DatasetGenerationError

    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the harness prints off standard output, which is for results, and its notices off standard error.

    What ``datasets`` logs about a file that it cannot read is in its exception as well. The harness asks git for the
    commit of the working directory, which complains on standard error where there is none; so it is not asked.
    """
    levels = {logging.getLogger("lm_eval"): logging.ERROR, logging.getLogger("datasets"): logging.CRITICAL}
    before = {logger: logger.level for logger in levels}
    for logger, level in levels.items():
        logger.setLevel(level)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            import lm_eval.evaluator  # within the redirection, since importing it prints and logs

            with mock.patch.object(lm_eval.evaluator, "get_git_commit_hash", create=True, return_value=None):
                yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)
