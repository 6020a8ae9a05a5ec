"""``tensorfold push``: the upload of a model's directory to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tensorfold.cli.options import Json
from tensorfold.cli.output import emit


def push(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The model, as fold or heal wrote it.")],
    repo: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub; created where there is none.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Create it as private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Upload nothing; show the model card and files.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a model with a card: base model, recipe, sizes, recorded evaluations, how to load it.

    Needs `hf auth login` once.
    """
    from tensorfold.export.hub import push_to_hub

    pushed = push_to_hub(directory, repo, private=private, dry_run=dry_run)
    emit(as_json, pushed.to_dict(), pushed.__str__)
