"""The command line. Results go to standard output, progress and messages to standard error.

Heavy imports live inside the commands, so that ``--help`` and usage errors answer at once.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import tensorfold
from tensorfold.cli.bench import DtypeChoice, bench
from tensorfold.cli.errors import can_be_put_right, check_encoding, explain, line
from tensorfold.cli.eval import evaluate
from tensorfold.cli.export import export
from tensorfold.cli.heal import heal
from tensorfold.cli.options import Command
from tensorfold.cli.push import push
from tensorfold.cli.report import report
from tensorfold.cli.sample import sample
from tensorfold.errors import InputError

if TYPE_CHECKING:
    from tensorfold.folding.from_disk import Stream
    from tensorfold.hf.sources import Source
    from tensorfold.recipes.recipe import Recipe

log = logging.getLogger(__name__)

app = typer.Typer(
    name="tensorfold",
    help="Fold the weights of transformer language models into chains of small tensors.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MODEL_HELP = "Hub id, local directory, .gguf file, or smollm2-135m."
TEXT_HELP = "File, .jsonl, directory, or a named text such as wikitext-2 or python-docs."
Model = Annotated[str | None, typer.Argument(metavar="[MODEL]", help=f"{MODEL_HELP} Default: the recipe's.")]
RecipeOption = Annotated[str | None, typer.Option("--recipe", help="A shipped recipe's name, or a YAML file.")]
Keep = Annotated[
    float | None, typer.Option("--keep", help="Fraction of the targeted parameters that stays, 0 < keep < 1.")
]
TargetsOption = Annotated[
    str | None,
    typer.Option(
        "--targets",
        help="With --keep, or plan --shapes: mlp, attention, embedding, positions, all-linear, or suffixes, "
        "comma-separated. Default: mlp.",
    ),
]
Untie = Annotated[
    bool,
    typer.Option(
        "--untie", help="First give a head that is tied to the input table its own copy, so that each can be a target."
    ),
]
EffortOption = Annotated[
    str | None,
    typer.Option(
        "--effort",
        help="With --keep and --calibrate: low, medium or high, how long the text is looked at. Default: medium.",
    ),
]
DtypeOption = Annotated[
    DtypeChoice | None, typer.Option("--dtype", help="Load the weights in this type. Default: as stored.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]


def _version(show: bool) -> None:
    if show:
        typer.echo(f"tensorfold {tensorfold.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; accepted anywhere.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    """Options before the command."""


@app.command(cls=Command)
def plan(
    model: Model = None,
    recipe: RecipeOption = None,
    keep: Keep = None,
    targets: TargetsOption = None,
    untie: Untie = False,
    shapes: Annotated[
        bool, typer.Option("--shapes", help="List the Kronecker shapes that the targets (default: mlp) can have.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what a recipe would do to a model. Reads its configuration, not its weights."""
    from tensorfold.folding.plan import plan as make_plan
    from tensorfold.hf.model_card import source_line

    if shapes:
        _list_shapes(model, recipe, keep, targets, untie, as_json)
        return
    chosen = _recipe(recipe, keep, targets, untie)
    source = _source(model, chosen)
    planned = make_plan(source.config(), chosen)
    stored = source.stored
    _emit(
        as_json,
        {**planned.to_dict(), **({"source": stored} if stored else {})},
        lambda: f"{planned}\nsource: {source_line(stored)}" if stored else str(planned),
    )


@app.command(cls=Command)
def fold(
    out: Annotated[Path, typer.Option("--out", help="Directory to write; must not exist, or be empty.")],
    model: Model = None,
    recipe: RecipeOption = None,
    keep: Keep = None,
    targets: TargetsOption = None,
    untie: Untie = False,
    effort: EffortOption = None,
    calibrate: Annotated[
        str | None, typer.Option("--calibrate", help=f"{TEXT_HELP} Default: the recipe's; 'none' folds data-free.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=2, help="How many tokens of it. Default: the recipe's, or 24,000.")
    ] = None,
    dtype: DtypeOption = None,
    as_json: Json = False,
) -> None:
    """Fold a model and write the smaller one. Under torchrun, its processes divide the matrices among themselves.

    A calibrated fold by one process keeps what is done in OUT.fold until OUT is there; the same command goes on.
    """
    from tensorfold.data.texts import describe, load_text
    from tensorfold.folding.from_disk import fold_stream, model_facts
    from tensorfold.folding.in_memory import fold as fold_model
    from tensorfold.folding.result import FoldReport
    from tensorfold.hf.loading import save
    from tensorfold.utils.atomic_files import check_target, claimed
    from tensorfold.utils.distributed import Ranks

    check_target(out)
    chosen = _recipe(recipe, keep, targets, untie, effort)
    if calibrate == "none":
        chosen, calibrate = chosen.without_text(), None
    text = calibrate or (chosen.calibrate.text if chosen.calibrate else None)
    ranks = Ranks.find(cpu=True)
    with ranks.together():
        documents = load_text(text, split="validation") if text else None
        source = _source(model, chosen)
        tokenizer, absent = (source.tokenizer(), None) if text else source.tokenizer_beside()
        stream = None if text or dtype else _stream(source, chosen)
        loaded = source.model(None if dtype is None else dtype.value) if stream is None else None
        bar = sys.stderr.isatty()

        def card(report: FoldReport) -> dict[str, Any]:
            label = f"{report.calibration_tokens} tokens of {describe(text, 'validation')}" if text else None
            return model_facts(source, _label(recipe, keep, targets, untie, effort), report, label)

        if stream is not None:
            report = fold_stream(stream, out, tokenizer, card, bar)
        else:
            partial = Path(f"{out}.fold") if text else None
            options: dict[str, Any] = {"calibration_tokens": tokens, "checkpoint": partial, "progress": bar}
            alone = partial is not None and ranks.count == 1  # several processes keep nothing there
            with claimed(partial, "choose another --out") if alone and partial else nullcontext():
                report = fold_model(loaded, chosen, tokenizer, documents, **options)
                if ranks.is_first:
                    save(loaded, tokenizer, out, card(report))
                    if partial is not None:
                        shutil.rmtree(partial, ignore_errors=True)
    if ranks.is_first:
        if absent is not None:
            typer.echo(f"written without a tokenizer: {absent}", err=True)
        result = {**report.to_dict(), "out": str(out)}
        _emit(as_json, result, lambda: f"{report}\nwritten to {out} in {report.seconds:.0f} s")
        if recipe is not None and chosen.eval is not None:
            typer.echo(f"how the recipe judges it: tensorfold eval {out} --recipe {recipe}", err=True)


app.command("eval", cls=Command)(evaluate)
app.command(cls=Command)(heal)
app.command(cls=Command)(bench)
app.command(cls=Command)(export)
app.command(cls=Command)(sample)
app.command(cls=Command)(report)
app.command(cls=Command)(push)


@app.command(cls=Command)
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show this recipe's file.")] = None,
    copy: Annotated[Path | None, typer.Option("--copy", help="Write it to this file, to be edited.")] = None,
) -> None:
    """List the shipped recipes, show one, or copy one."""
    from tensorfold.recipes.recipe import recipe_source, shipped_recipes
    from tensorfold.utils.atomic_files import check_file_target, write_file

    if name is None:
        for shipped in shipped_recipes():
            headline = recipe_source(shipped).partition("\n")[0].lstrip("# ")
            typer.echo(f"{shipped:<24} {headline}")
        return
    content = recipe_source(name)
    if copy is None:
        typer.echo(content, nl=False)
        return
    check_file_target(copy)
    if copy.exists():
        raise InputError(f"{copy}: exists already; name a new file.")
    write_file(copy, content.encode())
    typer.echo(f"written to {copy}", err=True)


@app.command(cls=Command)
def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory to write.")] = Path("tensorfold-demo"),
) -> None:
    """Fold the real SmolLM2-135M and show what it gained and what it cost."""
    from tensorfold.cli.demo import run_demo

    run_demo(out)


def _list_shapes(
    model: str | None, recipe: str | None, keep: float | None, targets: str | None, untie: bool, as_json: bool
) -> None:
    from tensorfold.folding.plan import skeleton
    from tensorfold.hf.sources import find_model
    from tensorfold.methods.shapes import shape_rows, shape_table
    from tensorfold.models.anatomy import match, matrices
    from tensorfold.models.surgery import untie_head

    if model is None or recipe is not None or keep is not None:
        raise InputError("plan --shapes: needed a MODEL, at most --targets and --untie; leave out --recipe and --keep.")
    empty = skeleton(find_model(model).config())
    if untie:
        untie_head(empty)
    available = matrices(empty)
    rows = shape_rows([available[name] for name in match(targets or "mlp", available, empty)])
    _emit(as_json, {"shapes": rows}, lambda: shape_table(rows))


def _recipe(
    recipe: str | None, keep: float | None, targets: str | None, untie: bool, effort: str | None = None
) -> Recipe:
    from tensorfold.recipes.recipe import Recipe

    if (recipe is None) == (keep is None):
        raise InputError(f"got {'both' if recipe else 'neither'} of --recipe and --keep; needed one of the two.")
    if recipe is not None:
        chosen = Recipe.load(recipe)
    else:
        assert keep is not None
        chosen = Recipe.keep(keep, "mlp" if targets is None else targets, effort or "medium")
    return dataclasses.replace(chosen, untie=chosen.untie or untie)


def _source(model: str | None, recipe: Recipe) -> Source:
    from tensorfold.hf.sources import find_model

    name = model or recipe.model
    if name is None:
        raise InputError("no MODEL given, and the recipe names none; needed a hub id, a directory or a .gguf file.")
    return find_model(name)


def _stream(source: Source, recipe: Recipe) -> Stream | None:
    """The fold from disk to disk, where the checkpoint and the recipe allow it; else the model has to be loaded."""
    from tensorfold.folding.from_disk import plan_stream
    from tensorfold.hf.on_disk import NotStoredError

    try:
        return plan_stream(source, recipe)
    except NotStoredError as error:
        log.debug("the model is loaded whole: %s", error)
        return None


def _label(recipe: str | None, keep: float | None, targets: str | None, untie: bool, effort: str | None = None) -> str:
    given = recipe if recipe is not None else f"--keep {keep} --targets {'mlp' if targets is None else targets}"
    given = f"{given} --effort {effort}" if effort else given
    return f"{given} --untie" if untie else given


def _emit(as_json: bool, data: dict[str, Any], text: Callable[[], str]) -> None:
    typer.echo(json.dumps(data) if as_json else text())


def run(arguments: list[str] | None = None) -> None:
    """Entry point: exit status 0 done, 1 failed or out of memory, 2 bad usage, bad input or a full disk.

    One clear line on standard error instead of a traceback.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    _quieten()
    try:
        check_encoding(given)
        arguments = [argument for argument in given if argument != "--debug"]
        status = app(arguments, prog_name="tensorfold", standalone_mode=False)
    except Exception as error:
        if debug:
            raise
        command = next((argument for argument in arguments or given if not argument.startswith("-")), "")
        print(f"tensorfold: {line(explain(error, command))}", file=sys.stderr)
        raise SystemExit(2 if can_be_put_right(error) else 1) from None
    raise SystemExit(status or 0)


def _quieten() -> None:
    """Keep the libraries' own progress bars and notices out of the way."""
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    logging.captureWarnings(True)


if __name__ == "__main__":
    run()
