"""The recipe and the model that the options of ``plan`` and ``fold`` name."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from tensorfold.errors import InputError

if TYPE_CHECKING:
    from tensorfold.hf.sources import Source
    from tensorfold.recipes.recipe import Recipe


def recipe_of(
    recipe: str | None,
    keep: float | None,
    targets: str | None,
    untie: bool,
    effort: str | None = None,
    plain: bool = False,
    multiple: int | None = None,
) -> Recipe:
    """The recipe that ``--recipe`` names, or the one that ``--keep`` stands for.

    Args:
        recipe: Name or file of a recipe.
        keep: Fraction of the targets' parameters that stays.
        targets: Matrices to fold, where ``keep`` is given; the MLP's by default.
        untie: Whether to untie the head first, whatever the recipe says.
        effort: How much time calibration takes, where ``keep`` is given; ``medium`` by default.
        plain: Whether the result is to be a plain model, where ``keep`` is given.
        multiple: What divides the ranks, units and heads that are chosen, where ``keep`` is given; 1 by default.

    Raises:
        InputError: Both or neither are given, or the recipe cannot be read.
    """
    from tensorfold.recipes.recipe import Recipe

    if (recipe is None) == (keep is None):
        raise InputError(f"got {'both' if recipe else 'neither'} of --recipe and --keep; needed one of the two.")
    if recipe is not None:
        chosen = Recipe.load(recipe)
    else:
        assert keep is not None
        chosen = Recipe.keep(keep, "mlp" if targets is None else targets, effort or "medium", plain, multiple or 1)
    return dataclasses.replace(chosen, untie=chosen.untie or untie)


def source_of(model: str | None, recipe: Recipe) -> Source:
    """The source of the model that the command line names, or else the recipe.

    Raises:
        InputError: Neither names one, or there is no such model.
    """
    from tensorfold.hf.sources import find_model

    name = model or recipe.model
    if name is None:
        raise InputError("no MODEL given, and the recipe names none; needed a hub id, a directory or a .gguf file.")
    return find_model(name)
