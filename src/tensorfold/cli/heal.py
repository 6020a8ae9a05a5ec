"""``tensorfold heal``: training of a folded model, with settings from options, a recipe and ``--set``."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from tensorfold.cli.options import OWN_TEXT_HELP, DtypeChoice, Json
from tensorfold.cli.output import emit
from tensorfold.errors import InputError

if TYPE_CHECKING:
    from tensorfold.recipes.settings import HealSettings


def heal(
    model: Annotated[str, typer.Argument(metavar="DIR", help="The folded model.")],
    train: Annotated[
        list[str] | None,
        typer.Option("--train", help=f"Text to train on; again for more. {OWN_TEXT_HELP} Default: the recipe's."),
    ] = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="The dense model, to distil from.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory to write; checkpoints lie in OUT.heal. Default: DIR-healed.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="Take its 'heal' settings; stages before the last stay in OUT.stage-N."),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimiser steps end to end.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Peak learning rate.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Windows in a step, over all devices.")] = None,
    micro_batch: Annotated[int | None, typer.Option("--micro-batch", help="Windows in one forward pass.")] = None,
    block: Annotated[int | None, typer.Option("--block", help="Tokens in a window.")] = None,
    blockwise_tokens: Annotated[
        int | None,
        typer.Option("--blockwise-tokens", help="First fit each block to the teacher's, on this many tokens."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, as in a recipe.")
    ] = None,
    report_to: Annotated[str, typer.Option("--report-to", help="none, tensorboard, wandb, …")] = "none",
    dtype: Annotated[
        DtypeChoice | None, typer.Option("--dtype", help="Load model and teacher in this type. Default: as stored.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            help="Train there: cpu, or the first card of a kind, such as cuda or mps. Default: what accelerate finds.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a folded model to recover its quality. The same command resumes a run that was killed."""
    given = {
        "steps": steps,
        "lr": lr,
        "batch": batch,
        "micro_batch": micro_batch,
        "block": block,
        "blockwise_tokens": blockwise_tokens,
    }
    chosen = _chosen(set_ or [], {key: value for key, value in given.items() if value is not None})
    named = chosen.pop("text", None)
    if train and named is not None:
        raise InputError("heal: got --train and --set text; needed one of the two.")
    if recipe is None and not train and named is None:
        raise InputError("heal: no text to train on; give --train TEXT, or a recipe with a text under heal.")
    stages = _stages(recipe, chosen, teacher is not None)

    if teacher is None and any(settings.needs_teacher for settings, _ in stages):
        raise InputError("heal: the settings compare with a teacher, and none was given; give --teacher MODEL.")

    from accelerate import PartialState

    from tensorfold.healing.device import training_on
    from tensorfold.healing.heal import heal as heal_model
    from tensorfold.hf.loading import load
    from tensorfold.hf.sources import find_model
    from tensorfold.recipes.recipe import Recipe
    from tensorfold.utils.distributed import processes

    source = find_model(model)
    beside = source.path.rstrip("/") if Path(source.path).is_dir() else source.name.rpartition("/")[2]
    target = Path(f"{beside}-healed") if out is None else out
    place = device if processes() == 1 else None  # several have one each
    started_from, kind = None, None if dtype is None else dtype.value
    with training_on(device):
        for number, (settings, overrides) in enumerate(stages, start=1):
            stage = target if number == len(stages) else Path(f"{target}.stage-{number}")
            report = heal_model(
                source.model(kind, place) if started_from is None else load(started_from),
                _sources(train or [named or settings.text]),
                teacher if teacher is None or (kind or place) is None else find_model(teacher).model(kind, place),
                tokenizer=source.tokenizer(),
                settings=settings,
                out=stage,
                progress=sys.stderr.isatty(),
                report_to=report_to,
                **overrides,
            )
            started_from = stage
        if PartialState().is_main_process:
            emit(as_json, report.to_dict(), report.__str__)
            if recipe is not None and Recipe.load(recipe).eval is not None:
                typer.echo(f"to evaluate it as the recipe does: tensorfold eval {target} --recipe {recipe}", err=True)


def _sources(names: list[str]) -> Any:
    """Texts to train on as :func:`tensorfold.healing.heal.heal` takes them; ``self`` stays a word, others are paths."""
    from tensorfold.calibration.own_text import SELF

    return SELF if set(names) == {SELF} else [name if name == SELF else Path(name) for name in names]


def _chosen(pairs: list[str], given: dict[str, Any]) -> dict[str, Any]:
    """The settings that are chosen on the command line, by name.

    Args:
        pairs: Values of ``--set``, such as ``kl=1``.
        given: Settings that have an option of their own.

    Raises:
        InputError: A pair is not KEY=VALUE, a key is unknown, or a setting is chosen twice.
    """
    from tensorfold.recipes.settings import HealSettings
    from tensorfold.utils.validation import check_keys

    values: dict[str, Any] = dict(given)
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"heal: --set {pair!r}; needed KEY=VALUE, for example --set kl=1.")
        try:
            parsed = yaml.safe_load(value)
        except (yaml.YAMLError, RecursionError, ValueError):
            raise InputError(f"heal: --set {pair!r}; the value is not valid YAML.") from None
        name = key.strip().replace("-", "_")
        if name in values:
            raise InputError(f"heal: --set {pair!r}, and {name}={values[name]!r} besides; needed one of the two.")
        values[name] = tuple(parsed) if isinstance(parsed, list) else parsed
    check_keys("heal", values, [field.name for field in dataclasses.fields(HealSettings)])
    return values


def _stages(recipe: str | None, chosen: dict[str, Any], teacher: bool) -> list[tuple[HealSettings, dict[str, Any]]]:
    """The stages of a recipe, or one with the defaults: settings, and which of the ``chosen`` ones replace some.

    Args:
        recipe: Name or file of the recipe; None for the defaults.
        chosen: Settings chosen on the command line, by name.
        teacher: Whether a teacher is given.

    Raises:
        InputError: The recipe has no stages, or a chosen setting is out of range or has no effect in any stage.
    """
    from tensorfold.recipes.recipe import Recipe
    from tensorfold.recipes.settings import HEAL_NEEDS, HealSettings
    from tensorfold.utils.effects import check_effects, has_effect

    stages = (HealSettings(),) if recipe is None else Recipe.load(recipe).heal
    if not stages:
        raise InputError(f"heal: the recipe {recipe} has no settings under 'heal'; give options instead.")
    whole = [dataclasses.replace(stage, **chosen) for stage in stages]
    whole = [settings.compared if teacher else settings for settings in whole]
    for name in chosen:
        if not any(has_effect(name, settings, HEAL_NEEDS) for settings in whole):
            check_effects("heal", [name], whole[0], HEAL_NEEDS)
    return [
        (stage, {name: value for name, value in chosen.items() if has_effect(name, settings, HEAL_NEEDS)})
        for stage, settings in zip(stages, whole, strict=True)
    ]
