"""``tensorfold push``: a model's directory on the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def push(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The model, as fold or heal wrote it.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make it a private one.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Upload nothing; show the model card and files.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")
    ] = False,
) -> None:
    """Upload a model with a card: base model, recipe, sizes, what eval --record noted, how to load it.

    Needs `hf auth login` once.
    """
    from tensorfold.export.hub import push_to_hub

    pushed = push_to_hub(directory, repo, private=private, dry_run=dry_run)
    typer.echo(json.dumps(pushed.to_dict()) if as_json else str(pushed))
