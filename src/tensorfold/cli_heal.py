"""``tensorfold heal``: its options, and how they, a recipe and ``--set`` make one set of settings."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from tensorfold.cli_bench import DtypeChoice
from tensorfold.errors import InputError

if TYPE_CHECKING:
    from tensorfold.settings import HealSettings


def heal(
    model: Annotated[str, typer.Argument(metavar="DIR", help="The folded model.")],
    train: Annotated[
        list[str] | None,
        typer.Option("--train", help="Text to train on; give it again for more. Default: the recipe's."),
    ] = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="The dense model, to be distilled from.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory to write [DIR-healed]; checkpoints lie in OUT.heal.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="Its 'heal' settings; stages before the last stay in OUT.stage-N."),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimiser steps end to end.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Peak learning rate.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Sequences in a step, over all devices.")] = None,
    micro_batch: Annotated[int | None, typer.Option("--micro-batch", help="Sequences in one forward pass.")] = None,
    block: Annotated[int | None, typer.Option("--block", help="Tokens in a sequence.")] = None,
    blockwise_tokens: Annotated[
        int | None, typer.Option("--blockwise-tokens", help="First fit each block to the teacher's on so many tokens.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, as in a recipe.")
    ] = None,
    report_to: Annotated[str, typer.Option("--report-to", help="none, tensorboard, wandb, …")] = "none",
    dtype: Annotated[
        DtypeChoice | None, typer.Option("--dtype", help="Load model and teacher in this type. Default: as stored.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")
    ] = False,
) -> None:
    """Train a folded model until it is good again. Killed and started again, it goes on where it was."""
    given = {
        "steps": steps,
        "lr": lr,
        "batch": batch,
        "micro_batch": micro_batch,
        "block": block,
        "blockwise_tokens": blockwise_tokens,
    }
    stages = _stages(recipe, set_ or [], {key: value for key, value in given.items() if value is not None})
    if not train and any(text is None for _, text in stages):
        raise InputError("heal: no text to train on; give --train TEXT, or a recipe with a text under heal.")

    if teacher is None and any(settings.needs_teacher for settings, _ in stages):
        raise InputError("heal: the settings compare with a teacher, and none was given; give --teacher MODEL.")

    from accelerate import PartialState

    from tensorfold.healing.run import heal as heal_model
    from tensorfold.hf.loading import load
    from tensorfold.hf.sources import find_model

    source = find_model(model)
    beside = source.path.rstrip("/") if Path(source.path).is_dir() else source.name.rpartition("/")[2]
    target = Path(f"{beside}-healed") if out is None else out
    started_from, kind = None, None if dtype is None else dtype.value
    for number, (settings, text) in enumerate(stages, start=1):
        stage = target if number == len(stages) else Path(f"{target}.stage-{number}")
        report = heal_model(
            source.model(kind) if started_from is None else load(started_from),
            [Path(name) for name in train or [text or ""]],
            teacher if kind is None or teacher is None else find_model(teacher).model(kind),
            tokenizer=source.tokenizer(),
            settings=settings,
            out=stage,
            progress=sys.stderr.isatty(),
            report_to=report_to,
        )
        started_from = stage
    if PartialState().is_main_process:
        typer.echo(json.dumps(report.to_dict()) if as_json else str(report))


def _stages(recipe: str | None, pairs: list[str], given: dict[str, Any]) -> list[tuple[HealSettings, str | None]]:
    """For each stage the recipe's settings, then ``--set``, then options of their own; and the text these name."""
    from tensorfold.recipe import Recipe
    from tensorfold.settings import HealSettings
    from tensorfold.strict import check_keys

    found = Recipe.load(recipe).heal if recipe is not None else None
    if recipe is not None and not found:
        raise InputError(f"heal: the recipe {recipe} has no settings under 'heal'; give options instead.")
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"heal: --set {pair!r}; needed KEY=VALUE, for example --set kl=1.")
        try:
            parsed = yaml.safe_load(value)
        except (yaml.YAMLError, RecursionError, ValueError):
            raise InputError(f"heal: --set {pair!r}; the value is not valid YAML.") from None
        values[key.strip().replace("-", "_")] = tuple(parsed) if isinstance(parsed, list) else parsed
    check_keys("heal", values, [field.name for field in dataclasses.fields(HealSettings)])
    stages = [None] if found is None else [found] if isinstance(found, HealSettings) else list(found)
    return [
        (
            dataclasses.replace(stage or HealSettings(), **{**values, **given}),
            values.get("text", stage.text if stage else None),
        )
        for stage in stages
    ]
