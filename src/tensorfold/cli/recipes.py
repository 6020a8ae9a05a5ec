"""``tensorfold recipes``: the shipped recipes, listed, shown or copied."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tensorfold.errors import InputError


def recipes(
    name: Annotated[str | None, typer.Argument(help="Show the file of this recipe.")] = None,
    copy: Annotated[Path | None, typer.Option("--copy", help="Write the recipe to this file, to be edited.")] = None,
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
