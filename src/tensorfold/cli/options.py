"""Options that several commands have, each with its one help text; commands keep their own options to themselves."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

MODEL_HELP = "Hub id, local directory, .gguf file, or smollm2-135m."
TEXT_HELP = "File, .jsonl, directory, or a named text such as wikitext-2 or python-docs."

# Where the model may write its own: calibration and training.
OWN_TEXT_HELP = f"{TEXT_HELP} 'self': text that the dense model writes."


class DtypeChoice(StrEnum):
    """Dtypes that weights can be converted to."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
ModelOrRecipe = Annotated[str | None, typer.Argument(metavar="MODEL", help=f"{MODEL_HELP} Default: the recipe's.")]
RecipeName = Annotated[str | None, typer.Option("--recipe", help="A shipped recipe's name, or a YAML file.")]
Keep = Annotated[
    float | None, typer.Option("--keep", help="Fraction of the targeted parameters that stays, 0 < keep < 1.")
]
TargetNames = Annotated[
    str | None,
    typer.Option(
        "--targets",
        help="With --keep, or plan --shapes: mlp, attention, experts, embedding, positions, all-linear, or "
        "suffixes, comma-separated. Default: mlp.",
    ),
]
Untie = Annotated[
    bool,
    typer.Option(
        "--untie", help="First give a head that is tied to the input table its own copy, so that each can be a target."
    ),
]
Multiple = Annotated[
    int | None,
    typer.Option(
        "--multiple",
        min=1,
        help="With --keep: hold ranks, hidden units and value heads to multiples of this, 32 for engines that store "
        "weights in groups of 32.",
    ),
]
Dtype = Annotated[
    DtypeChoice | None,
    typer.Option(
        "--dtype",
        help="Load the weights in this type. Default: as stored. Exported graphs compute in it: default float32.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="Compute there: cpu, cuda, cuda:1, mps, xpu. Default: cpu. 'auto' divides a model that is larger than one "
        "card over all of them and the memory.",
    ),
]
OneDevice = Annotated[
    str | None, typer.Option("--device", help="Compute there: cpu, cuda, cuda:1, mps, xpu. Default: cpu.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
