"""Every public function called with values it cannot use, drawn by hypothesis: an error of ours, or success."""

from __future__ import annotations

import copy
import inspect
import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from random import Random
from typing import Any

import torch
from cases import random_recipe
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from mutate import mutate_tree
from templates import PROSE, llama, tokenizer

import tensorfold
from tensorfold import nn

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.sampled_from([10**12, 2**63, -(10**20)]),
    st.floats(allow_nan=True, allow_infinity=True), st.text(max_size=8), st.binary(max_size=4),
    st.sampled_from(["mlp", "../../etc/passwd", "low-rank", "hf-1024", "disjoint-64", "float32", "no/such"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3), st.tuples(inner)
    ),
    max_leaves=4,
)
TENSORS = st.sampled_from(
    [torch.zeros(0), torch.ones(3), torch.full((4, 4), torch.nan), torch.ones(4, 4, dtype=torch.int64),
     torch.ones(2, 2, 2), torch.ones(8, 6), torch.ones(10, 32, dtype=torch.complex64), torch.ones(4, 4, device="meta")]
)  # fmt: skip
OBJECTS = st.sampled_from([object(), torch.nn.Linear(2, 2), Path("absent"), Path("."), lambda: None, int])
AUTO = {"targets": "mlp", "method": "auto", "keep": 0.5}
ANYTHING = st.one_of(VALUES, VALUES, TENSORS, OBJECTS)


def usual(templates: Path) -> dict[str, tuple[Callable[..., Any], dict[str, Callable[[], Any]]]]:
    """By name: the function, and arguments with which it works."""
    text = str(templates / "prose.txt")
    base, words = llama(), tokenizer()

    def folded() -> Any:
        return tensorfold.load(templates / "folded")

    def spec() -> Any:
        return tensorfold.Spec((4, 2), (2, 3), (2,))

    model: dict[str, Callable[[], Any]] = {"model": lambda: copy.deepcopy(base)}
    recipe: dict[str, Callable[[], Any]] = {"recipe": lambda: tensorfold.LowRank(keep=0.5)}
    own: dict[str, tuple[Callable[..., Any], dict[str, Callable[[], Any]]]] = {
        "Spec": (tensorfold.Spec, {"out_modes": lambda: (4, 2), "in_modes": lambda: (2, 3), "ranks": lambda: (2,)}),
        "Recipe": (tensorfold.Recipe, {"fold": lambda: (tensorfold.Rule("mlp", tensorfold.LowRank(keep=0.5)),),
                                       "layers": lambda: (0,), "untie": lambda: True}),
        "Recipe.from_dict": (tensorfold.Recipe.from_dict, {"data": lambda: {"fold": [AUTO]}}),
        "Recipe.of": (tensorfold.Recipe.of, recipe),
        "Recipe.keep": (tensorfold.Recipe.keep, {"keep": lambda: 0.5, "targets": lambda: "mlp",
                                                 "effort": lambda: "low"}),
        "Rule": (_rule, {**model, "targets": lambda: "mlp", "method": lambda: tensorfold.LowRank(keep=0.5),
                         "exclude": lambda: None, "split": lambda: None}),
        "plan": (tensorfold.plan, {"model_or_config": lambda: base, **recipe}),
        "fold": (tensorfold.fold, {**model, **recipe, "tokenizer": lambda: words, "calibration": lambda: [PROSE],
                                   "calibration_tokens": lambda: 100, "checkpoint": lambda: None}),
        "fold_directory": (_fold_directory, {"source": lambda: templates / "dense", **recipe, "out": lambda: "out"}),
        "load": (tensorfold.load, {"path": lambda: templates / "folded", "dtype": lambda: None}),
        "evaluate": (tensorfold.evaluate, {**model, "tokenizer": lambda: words, "text": lambda: PROSE[:600],
                                           "protocol": lambda: "disjoint-64", "max_tokens": lambda: 100,
                                           "batch_size": lambda: 1}),
        "heal": (tensorfold.heal, {"model": folded, "text": lambda: text, "teacher": lambda: None,
                                   "tokenizer": lambda: words, "steps": lambda: 1, "batch": lambda: 1,
                                   "block": lambda: 32}),
        "quantize": (tensorfold.quantize, {**model, "bits": lambda: 8}),
        "append_tokens": (tensorfold.append_tokens, {"model": folded, "vectors": lambda: torch.ones(2, 32)}),
        "bench": (tensorfold.bench, {"model": lambda: templates / "folded", "tokens": lambda: (1,),
                                     "prefill": lambda: 4,
                                     "decode": lambda: 1, "rounds": lambda: 1, "memory": lambda: False,
                                     "way": lambda: None}),
        "push_to_hub": (tensorfold.push_to_hub, {"directory": lambda: templates / "folded", "repo": lambda: "a/b",
                                                 "dry_run": lambda: True}),
        "write_report": (tensorfold.write_report, {"directories": lambda: [templates / "folded"],
                                                   "out": lambda: "out.html", "prompt": lambda: None,
                                                   "tokens": lambda: 2}),
        "nn.MPOLinear": (nn.MPOLinear, {"spec": spec, "bias": lambda: True}),
        "nn.MPOLinear.from_dense": (nn.MPOLinear.from_dense, {"weight": lambda: torch.ones(8, 6), "spec": spec,
                                                              "bias": lambda: None, "metric": lambda: None}),
        "nn.MPOEmbedding": (nn.MPOEmbedding, {"spec": spec}),
    }  # fmt: skip
    for kind, fields in (
        (tensorfold.LowRank, {"keep": 0.5, "pivots": True}), (tensorfold.LowRank, {"rank": 3}),
        (tensorfold.Kronecker, {"factor": (8, 4), "terms": 2, "scalars": True}),
        (tensorfold.Kronecker, {"keep": 0.5, "init": "normalized", "permute": "all"}),
        (tensorfold.MPO, {"keep": 0.5, "sites": 3}),
        (tensorfold.MPO, {"bond": 3, "out_modes": (8, 6), "in_modes": (4, 8)}),
        (tensorfold.TokenMPS, {"modes": (2, 2, 2, 2, 2), "rank": 2}), (tensorfold.Graded, {"keep": 0.5}),
        (tensorfold.Auto, {"keep": 0.5, "effort": "low", "floor": 0.5, "budget": "bytes"}),
    ):  # fmt: skip
        # A method is used as well as made: what it lets through must hold for a matrix.
        name = f"{kind.__name__}({', '.join(fields)})"
        own[name] = (_use(kind), {key: (lambda value=value: value) for key, value in fields.items()})
    own["SharedExperts"] = (_use_experts, {"keep": lambda: 0.5, "share": lambda: "both"})
    return own


def _use(kind: Any) -> Callable[..., Any]:
    def make(**fields: Any) -> Any:
        method = kind(**fields)
        spec = method.spec(48, 32)
        method.check(spec, False)
        return method.solve(torch.linspace(-1, 1, 48 * 32).reshape(48, 32), spec)

    return make


def _use_experts(**fields: Any) -> Any:
    return tensorfold.SharedExperts(**fields).spec_of_experts(4, 48, 32, 32)


def _rule(model: Any, **fields: Any) -> Any:
    return tensorfold.plan(model, tensorfold.Recipe((tensorfold.Rule(**fields),)))


def _fold_directory(source: Any, recipe: Any, out: Any) -> Any:
    try:
        return tensorfold.fold_directory(source, recipe, out)
    finally:
        shutil.rmtree("out", ignore_errors=True)


def call_everything(
    count: int,
    templates: Path,
    note: Callable[[dict[str, Any]], None],
    timed: Callable[[float], AbstractContextManager[None]],
    captured: Callable[[Path], AbstractContextManager[None]],
    printed: Path,
) -> None:
    """``count`` calls, shared evenly among the public functions; notes one entry for each."""
    functions = usual(templates)
    public = {name.partition(".")[0].partition("(")[0] for name in functions}
    left_out = set(tensorfold.__all__) - public - {"InputError", "SpecError", "TensorfoldError"}
    assert not left_out, left_out
    for name, (function, arguments) in functions.items():
        function(**{key: make() for key, make in arguments.items()})  # works: the values alone will be at fault
        _tidy(set())
        _call_one(name, function, arguments, -(-count // len(functions)), note, timed, captured, printed)


def _call_one(
    name: str,
    function: Callable[..., Any],
    arguments: dict[str, Callable[[], Any]],
    count: int,
    note: Callable[[dict[str, Any]], None],
    timed: Callable[[float], AbstractContextManager[None]],
    captured: Callable[[Path], AbstractContextManager[None]],
    printed: Path,
) -> None:
    @seed(0)
    @settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.lists(st.tuples(st.sampled_from(sorted(arguments)), ANYTHING), min_size=1, max_size=2), st.integers(0))
    def call(changes: Any, number: int) -> None:
        changed = dict(changes)
        if name == "Recipe.from_dict":
            random = Random(number)
            changed["data"] = random_recipe(random)
            mutate_tree(random, changed["data"])
        shown = ", ".join(f"{key}={_short(value)}" for key, value in changed.items())
        values = {key: changed[key] if key in changed else make() for key, make in arguments.items()}
        before = set(os.listdir())
        error: BaseException | None = None
        with captured(printed):
            try:
                with timed(30):
                    function(**values)
            except BaseException as raised:
                error = raised
        entry: dict[str, Any] = {
            "call": name,
            "what": shown[:300],
            "verdict": "accepted" if error is None else "refused",
        }
        if error is not None:
            entry["message"] = f"{type(error).__name__}: {error}"[:300]
        left = sorted(set(os.listdir()) - before)
        fine = error is None or isinstance(error, tensorfold.TensorfoldError)
        if not fine or (left and error is not None):
            entry.update(verdict="wrong", wrong=[f"left {left}"] if fine else ["a foreign exception"])
            print(name, shown, entry["message"])
        _tidy(before)
        note(entry)

    call()


def _tidy(kept: set[str]) -> None:
    for path in set(os.listdir()) - kept:
        if os.path.isdir(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    if inspect.isroutine(value) or type(value) is object:
        return type(value).__name__
    try:
        return json.dumps(value)[:150]
    except (TypeError, ValueError):
        return repr(value)[:150]
