"""``tensorfold eval``: a model's quality by a named protocol, on a text that options or a recipe name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorfold.cli.options import TEXT_HELP, Device, Dtype, Json, ModelOrRecipe
from tensorfold.cli.output import emit
from tensorfold.errors import InputError

if TYPE_CHECKING:
    from tensorfold.recipes.recipe import Recipe


def evaluate(
    model: ModelOrRecipe = None,
    text: Annotated[str | None, typer.Option("--text", help=f"{TEXT_HELP} Default: the recipe's.")] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            "--protocol",
            help="hf-1024, hf-512, krony, svd-llm, lambada, disjoint-N, or lm-eval. Default: the recipe's, or hf-1024.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="How many tokens of the text, from its beginning. Default: all.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="Tasks of lm-eval, comma-separated: wikitext, lambada_openai, …")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="Directory with YAML files of further tasks for lm-eval.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="Take text and protocol from its 'eval' section, where no option gives them."),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite",
            help="Judge by several texts and tasks, in one table: quick (8,192 tokens of each text) or full. What this "
            "machine lacks is left out, with the reason.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Most documents of each task of lm-eval.")] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="MODEL",
            help="Judge this model too, and give the ratio of the perplexities with its confidence interval, paired by "
            "window.",
        ),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    record: Annotated[
        bool, typer.Option("--record", help="Record the result in the model's directory, for tensorfold report.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity and accuracy by a named protocol, with a 95 % confidence interval from its windows."""
    from tensorfold.evaluation.intervals import compare
    from tensorfold.evaluation.perplexity import check_judge
    from tensorfold.evaluation.perplexity import evaluate as measure
    from tensorfold.evaluation.protocols import HARNESS, form_needed
    from tensorfold.export.engine_model import find_runnable
    from tensorfold.utils.records import check_recordable, record_evaluation

    if recipe is not None:
        chosen = _judge_of(recipe)
        model = model or chosen.model
        if protocol != HARNESS and chosen.eval is not None:
            text, protocol = text or chosen.eval.text, protocol or chosen.eval.protocol
            max_tokens = max_tokens or chosen.eval.max_tokens
    if model is None:
        raise InputError(
            "eval: no MODEL given; needed a hub id, a directory, a .gguf file, or a recipe that names one."
        )
    if suite is not None:
        _evaluate_suite(model, suite, dtype, device, record, as_json)
        return
    protocol = protocol or "hf-1024"
    check_judge(protocol, text, tasks, include_path, limit, max_tokens)
    if record:
        check_recordable(model)
    if protocol == HARNESS:
        from tensorfold.evaluation.lm_eval import check_tasks

        judge: dict[str, Any] = {"tasks": check_tasks((tasks or "").split(","), include_path, limit)}
        judge.update(include_path=include_path, limit=limit)
    else:
        from tensorfold.data.texts import describe, in_form, load_text

        name = in_form(text or "", form_needed(protocol))
        judge = {"text": load_text(name), "text_name": describe(name), "max_tokens": max_tokens}
    sources = [find_runnable(name) for name in (model, against) if name is not None]
    results = []
    for source in sources:
        loaded = source.model(None if dtype is None else dtype.value, device)
        results.append(measure(loaded, source.tokenizer(), protocol=protocol, **judge))
        del loaded
    if record:
        record_evaluation(model, results[0].to_dict())
    compared = compare(*results) if against is not None else None
    found = results[0].to_dict()
    if compared is not None:
        found |= {"against": results[1].to_dict(), "ratio": compared.ratio, "ratio_interval": compared.interval}
    emit(as_json, found, lambda: "\n".join(map(str, [*results, *([compared] if compared else [])])))


def _evaluate_suite(model: str, suite: str, dtype: Any, device: str | None, record: bool, as_json: bool) -> None:
    """Judge a model by a suite and print its table."""
    from tensorfold.evaluation.suites import evaluate_suite, find_suite
    from tensorfold.export.engine_model import find_runnable
    from tensorfold.utils.records import check_recordable, record_evaluation

    find_suite(suite)
    if record:
        check_recordable(model)
    source = find_runnable(model)
    loaded = source.model(None if dtype is None else dtype.value, device)
    shown = (lambda name: typer.echo(f"{name} …", err=True)) if sys.stderr.isatty() else None
    result = evaluate_suite(loaded, source.tokenizer(), suite, progress=shown)
    for row in result.rows if record else ():
        record_evaluation(model, row.to_dict())
    emit(as_json, result.to_dict(), lambda: str(result))


def _judge_of(recipe: str) -> Recipe:
    """A recipe with an ``eval`` section.

    Raises:
        InputError: It has none, or cannot be read.
    """
    from tensorfold.recipes.recipe import Recipe

    chosen = Recipe.load(recipe)
    if chosen.eval is None:
        raise InputError(f"eval: the recipe {recipe} has no section 'eval'; give --text and --protocol instead.")
    return chosen
