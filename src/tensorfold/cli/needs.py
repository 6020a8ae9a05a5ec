"""Conditions under which the options of every command have an effect; an option without one is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typer.core import TyperCommand

from tensorfold.utils.effects import ALWAYS, Need, Needs, check_effects

Values = Mapping[str, Any]

_NO_RECIPE = Need("--keep; a recipe names its own targets, edit it", lambda given: given["recipe"] is None)
_NO_EFFORT = Need(
    "--keep; in a recipe, effort belongs to entries of method: auto", lambda given: given["recipe"] is None
)
_NO_PLAIN = Need("--keep; in a recipe, plain belongs to entries of method: auto", lambda given: given["recipe"] is None)
_NO_MULTIPLE = Need(
    "--keep; in a recipe, multiple belongs to entries of method: auto or low-rank",
    lambda given: any(given.get(size) is not None for size in ("keep", "size", "bytes_")),
)
_SIZE = Need("--size or --bytes", lambda given: given["size"] is not None or given["bytes_"] is not None)
_HARNESS = Need("--protocol lm-eval", lambda given: given["protocol"] == "lm-eval")
_NO_SUITE = Need("no --suite, which has texts and protocols of its own", lambda given: given["suite"] is None)
_TEXT_PROTOCOL = Need("a protocol that reads a text, not lm-eval", lambda given: given["protocol"] != "lm-eval")
_NOT_NARROWED = Need("a fold without --plain, which narrows the MLPs", lambda given: not given["plain"])
_SAMPLING = Need("a --temperature above 0", lambda given: given["temperature"] > 0)
_SAMPLES = Need("samples; leave out --no-samples", lambda given: given["samples"])
_PACKED = Need("--to onnx, openvino or gguf", lambda given: str(given["to"]) in ("onnx", "openvino", "gguf"))
_FOUR_BITS = Need(
    "--to openvino --bits 4, whose scales a text can be fitted to",
    lambda given: str(given["to"]) == "openvino" and str(given["bits"]) == "4",
)
_MULTIPLIED_OUT = Need(
    "--to dense or int8: graphs and GGUF files are made of float32", lambda given: str(given["to"]) in ("dense", "int8")
)
_WRITTEN_THERE = Need(
    "--to dense or int8: graphs and GGUF files are written by the CPU",
    lambda given: str(given["to"]) in ("dense", "int8") or given["device"] == "cpu",
)
_FITTED = Need("--calibrate TEXT", lambda given: given["calibrate"] is not None)
_NAME = Need("the name of a shipped recipe", lambda given: given["name"] is not None)


def _calibrates(given: Values) -> bool:
    """Whether a fold has calibration text, by its options and its recipe."""
    if given["calibrate"] or given["recipe"] is None:
        return "none" not in (given["calibrate"] or ())
    from tensorfold.recipes.recipe import Recipe

    return Recipe.load(given["recipe"]).calibrate is not None


_CALIBRATION = Need("calibration text: --calibrate TEXT", _calibrates)

_MODEL = {"model": ALWAYS, "as_json": ALWAYS}
_RECIPE = {"recipe": ALWAYS, "keep": ALWAYS, "targets": (_NO_RECIPE,), "untie": ALWAYS, "multiple": (_NO_MULTIPLE,)}

# By command and parameter. Options whose effect depends on the model are checked once the model is known.
NEEDS: Mapping[str, Needs] = {
    "compress": {
        **_MODEL,
        **dict.fromkeys(("out", "size", "bytes_", "text", "unseen", "minutes", "to", "bits"), ALWAYS),
        **dict.fromkeys(("plain", "effort", "tokens", "max_tokens", "device"), ALWAYS),
        "targets": (_NOT_NARROWED,),
    },
    "plan": {
        **_MODEL,
        **_RECIPE,
        **dict.fromkeys(("shapes", "size", "bytes_"), ALWAYS),
        **dict.fromkeys(("to", "bits"), (_SIZE,)),
    },
    "fold": {
        **_MODEL,
        **_RECIPE,
        "out": ALWAYS,
        "dtype": ALWAYS,
        "device": ALWAYS,
        "effort": (_NO_EFFORT, _CALIBRATION),
        "plain": (_NO_PLAIN, _CALIBRATION),
        "calibrate": ALWAYS,
        "tokens": (_CALIBRATION,),
        "low_memory": (_CALIBRATION,),
    },
    "heal": {
        **_MODEL,
        **dict.fromkeys(("train", "teacher", "out", "recipe", "report_to", "dtype", "device"), ALWAYS),
        # Settings of healing, checked together with a recipe's: tensorfold.recipes.settings.HEAL_NEEDS.
        **dict.fromkeys(("steps", "lr", "batch", "micro_batch", "block", "blockwise_tokens", "set_"), ALWAYS),
    },
    "eval": {
        **_MODEL,
        "suite": ALWAYS,
        "recipe": (_NO_SUITE,),
        "protocol": (_NO_SUITE,),
        "record": ALWAYS,
        "dtype": ALWAYS,
        "device": ALWAYS,
        "text": (_NO_SUITE, _TEXT_PROTOCOL),
        "max_tokens": (_NO_SUITE, _TEXT_PROTOCOL),
        "against": (_NO_SUITE, _TEXT_PROTOCOL),
        "tasks": (_HARNESS,),
        "include_path": (_HARNESS,),
        "limit": (_HARNESS,),
    },
    "bench": {
        **_MODEL,
        **dict.fromkeys(
            ("against", "prefill", "decode", "rounds", "threads", "dtype", "device", "memory", "plot"), ALWAYS
        ),
        # Settings of single folded layers, checked once it is known whether there are any: settings.BENCH_NEEDS.
        **dict.fromkeys(("tokens", "way"), ALWAYS),
    },
    "export": {
        **_MODEL,
        "to": ALWAYS,
        "out": ALWAYS,
        "bits": (_PACKED,),
        "calibrate": (_FOUR_BITS,),
        "tokens": (_FITTED,),
        "dtype": (_MULTIPLIED_OUT,),
        "device": (_WRITTEN_THERE,),
    },
    "sample": {
        **_MODEL,
        "prompt": ALWAYS,
        "tokens": ALWAYS,
        "dtype": ALWAYS,
        "device": ALWAYS,
        "temperature": ALWAYS,
        "top_k": (_SAMPLING,),
        "seed": (_SAMPLING,),
    },
    "report": {
        "directories": ALWAYS,
        "out": ALWAYS,
        "prompt": (_SAMPLES,),
        "tokens": (_SAMPLES,),
        "samples": ALWAYS,
        "dtype": (_SAMPLES,),
        "device": (_SAMPLES,),
        "as_json": ALWAYS,
    },
    "push": {
        "directory": ALWAYS,
        "repo": ALWAYS,
        "private": ALWAYS,  # in a dry run too, which takes the options of the upload
        "dry_run": ALWAYS,
        "as_json": ALWAYS,
    },
    "recipes": {"name": ALWAYS, "copy": (_NAME,)},
    "demo": {"out": ALWAYS, "device": ALWAYS},
}


class Command(TyperCommand):
    """A command that refuses options without an effect before it does anything."""

    def invoke(self, ctx: Any) -> Any:
        """Check the given options, then run the command.

        Raises:
            InputError: An option has no effect.
        """
        given = [name for name in ctx.params if _was_given(ctx, name)]
        check_effects(str(self.name), given, ctx.params, NEEDS[str(self.name)], self._shown)
        return super().invoke(ctx)

    def _shown(self, name: str) -> str:
        """A parameter's name in messages: an option as it is typed, an argument by its name."""
        parameter = next(parameter for parameter in self.params if parameter.name == name)
        return max(parameter.opts, key=len)


def _was_given(ctx: Any, name: str) -> bool:
    """Whether a parameter stands on the command line, in difference to its default."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
