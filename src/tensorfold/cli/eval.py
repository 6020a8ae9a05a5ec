"""``tensorfold eval``: what a model is judged by, from options or a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorfold.cli.bench import DtypeChoice
from tensorfold.errors import InputError

if TYPE_CHECKING:
    from tensorfold.recipes.recipe import Recipe


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="Hub id, local directory, .gguf file, or smollm2-135m. Default: the recipe's."
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text", help="File, .jsonl, directory, or a named text such as wikitext-2. Default: the recipe's."
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            "--protocol",
            help="hf-1024, hf-512, krony, svd-llm, lambada, disjoint-N, or lm-eval. Default: the recipe's, or hf-1024.",
        ),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Use only the first this many.")] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="Of lm-eval, comma-separated: wikitext, lambada_openai, …")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="Of lm-eval: a directory with YAML files of further tasks.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Judge by its 'eval' section, where no option says otherwise.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Of lm-eval: documents of each task, at most.")] = None,
    dtype: Annotated[
        DtypeChoice | None, typer.Option("--dtype", help="Load the weights in this type. Default: as stored.")
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Note the result in the model's directory, for tensorfold report.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")
    ] = False,
) -> None:
    """Measure perplexity and accuracy by a named protocol."""
    from tensorfold.evaluation.perplexity import check_judge
    from tensorfold.evaluation.perplexity import evaluate as measure
    from tensorfold.evaluation.protocols import HARNESS, form_needed
    from tensorfold.hf.sources import find_model
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
    source = find_model(model)
    loaded = source.model(None if dtype is None else dtype.value)
    result = measure(loaded, source.tokenizer(), protocol=protocol, **judge)
    if record:
        record_evaluation(model, result.to_dict())
    typer.echo(json.dumps(result.to_dict()) if as_json else str(result))


def _judge_of(recipe: str) -> Recipe:
    """A recipe that says how a model is judged.

    Raises:
        InputError: It does not.
    """
    from tensorfold.recipes.recipe import Recipe

    chosen = Recipe.load(recipe)
    if chosen.eval is None:
        raise InputError(f"eval: the recipe {recipe} has no section 'eval'; give --text and --protocol instead.")
    return chosen
