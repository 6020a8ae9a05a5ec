"""``tensorfold plan``: what a recipe would do to a model, by its configuration alone."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from tensorfold.cli.compress import Engine, size_asked
from tensorfold.cli.export import Bits
from tensorfold.cli.given import recipe_of, source_of
from tensorfold.cli.options import Json, Keep, ModelOrRecipe, Multiple, RecipeName, TargetNames, Untie
from tensorfold.cli.output import emit
from tensorfold.errors import InputError


def plan(
    model: ModelOrRecipe = None,
    recipe: RecipeName = None,
    keep: Keep = None,
    targets: TargetNames = None,
    untie: Untie = False,
    multiple: Multiple = None,
    shapes: Annotated[
        bool, typer.Option("--shapes", help="List the Kronecker shapes that the targets (default: mlp) can have.")
    ] = False,
    size: Annotated[
        float | None, typer.Option("--size", help="Fraction of the model's parameters that stays, as of compress.")
    ] = None,
    bytes_: Annotated[
        str | None, typer.Option("--bytes", metavar="60MB", help="Size of the result's weights, as of compress.")
    ] = None,
    to: Annotated[
        Engine | None, typer.Option("--to", help="What --size or --bytes is for. Default: transformers.")
    ] = None,
    bits: Annotated[Bits | None, typer.Option("--bits", help="Of a stored number, with --size or --bytes.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a recipe or a size would do to a model. Reads its configuration, not its weights."""
    from tensorfold.folding.plan import plan as make_plan
    from tensorfold.hf.model_card import source_line

    if size is not None or bytes_ is not None:
        if recipe is not None or keep is not None or shapes:
            raise InputError("plan: --size and --bytes go without --recipe, --keep and --shapes; leave those out.")
        if model is None:
            raise InputError("plan: no MODEL; needed the model that --size or --bytes is of.")
        _show_size(model, targets, untie, multiple, size, bytes_, to, bits, as_json)
        return
    if shapes:
        _list_shapes(model, recipe, keep, targets, untie, as_json)
        return
    chosen = recipe_of(recipe, keep, targets, untie, multiple=multiple)
    source = source_of(model, chosen)
    planned = make_plan(source.config(), chosen)
    stored = source.stored
    emit(
        as_json,
        {**planned.to_dict(), **({"source": stored} if stored else {})},
        lambda: f"{planned}\nsource: {source_line(stored)}" if stored else str(planned),
    )


def _show_size(
    model: str,
    targets: str | None,
    untie: bool,
    multiple: int | None,
    size: float | None,
    most: str | None,
    to: Engine | None,
    bits: Bits | None,
    as_json: bool,
) -> None:
    """Print the fraction to keep, parameters, multiply–adds and bytes of a size."""
    from tensorfold.cli.sizes import aim_at, targets_of_size
    from tensorfold.hf.sources import find_model
    from tensorfold.recipes.recipe import Recipe

    fraction, number = size_asked("plan", size, most)
    config, engine = find_model(model).config(), (to or Engine.transformers).value
    recipe = Recipe.keep(0.5, targets or targets_of_size(config, engine), multiple=multiple or 1)
    recipe = dataclasses.replace(recipe, untie=untie)
    aim = aim_at(config, recipe, engine, None if bits is None else int(bits.value), fraction, number)
    emit(as_json, aim.to_dict(), aim.__str__)


def _list_shapes(
    model: str | None, recipe: str | None, keep: float | None, targets: str | None, untie: bool, as_json: bool
) -> None:
    """Print the Kronecker shapes that the targets can have.

    Raises:
        InputError: No model is given, or an option that goes with recipes is.
    """
    from tensorfold.folding.plan import skeleton
    from tensorfold.hf.sources import find_model
    from tensorfold.hf.surgery import untie_head
    from tensorfold.methods.shapes import shape_rows, shape_table
    from tensorfold.models.anatomy import matrices
    from tensorfold.models.targets import match

    if model is None or recipe is not None or keep is not None:
        raise InputError("plan --shapes: needed a MODEL, at most --targets and --untie; leave out --recipe and --keep.")
    empty = skeleton(find_model(model).config())
    if untie:
        untie_head(empty)
    available = matrices(empty)
    rows = shape_rows([available[name] for name in match(targets or "mlp", available, empty)])
    emit(as_json, {"shapes": rows}, lambda: shape_table(rows))
