"""Options, keys of recipes and keywords without an effect are errors that say what they need."""

import dataclasses

import pytest
import typer
import yaml

import tensorfold
from tensorfold.cli.main import app
from tensorfold.cli.needs import NEEDS
from tensorfold.errors import InputError
from tensorfold.methods.base import METHODS
from tensorfold.recipes.settings import BENCH_NEEDS, HEAL_NEEDS, BenchSettings, HealSettings

COMMANDS = typer.main.get_command(app).commands

# Settings of methods that always have an effect. A new one belongs here, or into the method's needs.
PLAIN = {
    "auto": {"keep"},
    "graded": {"keep", "slope", "exponent"},
    "kronecker": {"factor", "terms", "keep", "init", "scalars", "pad", "order"},
    "low-rank": {"keep", "rank", "pivots"},
    "mpo": {"bond", "keep", "sites", "out_modes", "in_modes", "init", "order"},
    "token-mps": {"modes", "rank", "keep"},
}
OURS = [getattr(tensorfold, name) for name in ("Auto", "Graded", "Kronecker", "LowRank", "MPO", "TokenMPS")]

# For each command and parameter with a condition: arguments that break it, and words of the message.
WITHOUT = {
    ("plan", "targets"): [(("m", "--recipe", "demo", "--targets", "mlp"), "--keep")],
    ("fold", "targets"): [(("m", "--out", "o", "--recipe", "demo", "--targets", "mlp"), "--keep")],
    ("fold", "effort"): [
        (("m", "--out", "o", "--keep", ".6", "--calibrate", "none", "--effort", "high"), "--calibrate TEXT"),
        (("m", "--out", "o", "--keep", ".6", "--calibrate", "none", "--effort", "low"), "--calibrate TEXT"),
        (("m", "--out", "o", "--recipe", "demo", "--effort", "high"), "method: auto"),
    ],
    ("plan", "multiple"): [
        (("m", "--recipe", "demo", "--multiple", "8"), "--keep"),
        (("m", "--shapes", "--multiple", "8"), "--keep"),
    ],
    ("plan", "to"): [(("m", "--keep", ".5", "--to", "onnx"), "--size or --bytes")],
    ("plan", "bits"): [(("m", "--keep", ".5", "--bits", "8"), "--size or --bytes")],
    ("fold", "multiple"): [(("m", "--out", "o", "--recipe", "demo", "--multiple", "8"), "method: auto or low-rank")],
    ("compress", "targets"): [
        (("m", "--out", "o", "--size", ".6", "--plain", "--targets", "mlp"), "a fold without --plain"),
    ],
    ("fold", "plain"): [
        (("m", "--out", "o", "--keep", ".6", "--calibrate", "none", "--plain"), "--calibrate TEXT"),
        (("m", "--out", "o", "--recipe", "demo", "--plain"), "method: auto"),
    ],
    ("fold", "tokens"): [
        (("m", "--out", "o", "--keep", ".6", "--calibrate", "none", "--tokens", "5000"), "--calibrate TEXT"),
        (("m", "--out", "o", "--recipe", "krony-81m", "--tokens", "5000"), "--calibrate TEXT"),
        (("m", "--out", "o", "--recipe", "demo", "--calibrate", "none", "--tokens", "5000"), "--calibrate TEXT"),
    ],
    ("fold", "low_memory"): [
        (("m", "--out", "o", "--keep", ".6", "--calibrate", "none", "--low-memory"), "--calibrate TEXT"),
    ],
    ("eval", "recipe"): [(("--suite", "quick", "--recipe", "demo"), "no --suite")],
    ("eval", "protocol"): [(("m", "--suite", "quick", "--protocol", "krony"), "no --suite")],
    ("eval", "text"): [
        (("m", "--protocol", "lm-eval", "--tasks", "t", "--text", "x"), "not lm-eval"),
        (("m", "--suite", "quick", "--text", "x"), "no --suite"),
    ],
    ("eval", "max_tokens"): [
        (("m", "--protocol", "lm-eval", "--tasks", "t", "--max-tokens", "9"), "not lm-eval"),
        (("m", "--suite", "quick", "--max-tokens", "9"), "no --suite"),
    ],
    ("eval", "against"): [
        (("m", "--protocol", "lm-eval", "--tasks", "t", "--against", "n"), "not lm-eval"),
        (("m", "--suite", "quick", "--against", "n"), "no --suite"),
    ],
    ("eval", "tasks"): [(("m", "--text", "x", "--tasks", "t"), "--protocol lm-eval")],
    ("eval", "include_path"): [(("m", "--text", "x", "--include-path", "p"), "--protocol lm-eval")],
    ("eval", "limit"): [(("m", "--text", "x", "--limit", "3"), "--protocol lm-eval")],
    ("export", "bits"): [(("m", "--to", "dense", "--out", "o", "--bits", "8"), "--to onnx, openvino or gguf")],
    ("export", "dtype"): [(("m", "--to", "onnx", "--out", "o", "--dtype", "bfloat16"), "--to dense or int8")],
    ("export", "device"): [(("m", "--to", "openvino", "--out", "o", "--device", "cuda"), "--to dense or int8")],
    ("export", "calibrate"): [
        (("m", "--to", "onnx", "--bits", "4", "--out", "o", "--calibrate", "self"), "--to openvino --bits 4"),
        (("m", "--to", "openvino", "--bits", "8", "--out", "o", "--calibrate", "self"), "--to openvino --bits 4"),
    ],
    ("export", "tokens"): [
        (("m", "--to", "openvino", "--bits", "4", "--out", "o", "--tokens", "9"), "--calibrate TEXT")
    ],
    ("sample", "top_k"): [(("m", "--temperature", "0", "--top-k", "5"), "--temperature above 0")],
    ("sample", "seed"): [(("m", "--temperature", "0", "--seed", "0"), "--temperature above 0")],
    ("report", "dtype"): [(("d", "--out", "o", "--no-samples", "--dtype", "bfloat16"), "samples; leave out")],
    ("report", "device"): [(("d", "--out", "o", "--no-samples", "--device", "cuda"), "samples; leave out")],
    ("report", "prompt"): [(("d", "--out", "o", "--no-samples", "--prompt", "x"), "--no-samples")],
    ("report", "tokens"): [(("d", "--out", "o", "--no-samples", "--tokens", "48"), "--no-samples")],
    ("recipes", "copy"): [(("--copy", "x"), "name of a shipped recipe")],
}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_of_every_command_states_its_need(name):
    assert {parameter.name for parameter in COMMANDS[name].params} == set(NEEDS[name])


def test_every_need_of_an_option_is_tried_below():
    assert {(name, key) for name, needs in NEEDS.items() for key, need in needs.items() if need} == set(WITHOUT)


@pytest.mark.parametrize(
    ("name", "key", "arguments", "needed"),
    [(*place, *case) for place, cases in WITHOUT.items() for case in cases],
)
def test_an_option_without_effect_is_refused(refused, name, key, arguments, needed):
    parameter = next(parameter for parameter in COMMANDS[name].params if parameter.name == key)
    refused(name, *arguments, says=[f"{name}: {parameter.opts[0]} has no effect here; it needs", needed])


def test_every_setting_states_its_need():
    assert set(HEAL_NEEDS) == {field.name for field in dataclasses.fields(HealSettings)}
    assert set(BENCH_NEEDS) == {field.name for field in dataclasses.fields(BenchSettings)}
    shipped = {kind.name: kind for kind in OURS}
    assert set(shipped) == set(PLAIN)
    for name, kind in shipped.items():
        stated = PLAIN[name] | kind.needs.keys() | kind.needs_of_use.keys()
        assert stated == {field.name for field in dataclasses.fields(kind)}


OTHER = {  # values other than the default, where none can be derived
    "micro_batch": 4, "windows": "random", "schedule": "linear", "betas": (0.8, 0.9), "precision": "bf16",
    "train": "cores", "select": "last", "evaluate_every": 3, "save_every": 3, "patience": 2, "lr": 0.5,
    "lr_sweep": (1e-3, 1e-4),
}  # fmt: skip
SWITCH = {  # settings that break a condition, by the condition
    "steps above 0": {"steps": 0, "blockwise_tokens": 64},
    "validation_fraction above 0": {"validation_fraction": 0.0},
    "blockwise_tokens above 0": {},
    "schedule: cosine": {"schedule": "constant"},
    "cross_entropy above 0": {"cross_entropy": 0.0, "kl": 1.0},
    "kl above 0": {"ffn": 1.0},
    "no lr_sweep, which chooses it": {"lr_sweep": (1e-3, 1e-4)},
}


def other(name):
    default = next(field.default for field in dataclasses.fields(HealSettings) if field.name == name)
    if name in OTHER:
        return OTHER[name]
    if isinstance(default, bool):
        return not default
    return 0.00001 if name == "min_lr" else 0.5 if isinstance(default, float) else 3


@pytest.mark.parametrize(("name", "what"), [(name, need.what) for name, needs in HEAL_NEEDS.items() for need in needs])
def test_a_setting_of_healing_that_another_switches_off_is_refused(name, what, student, command, tmp_path):
    settings = {**SWITCH[what], name: other(name)}
    wanted = f"{name} has no effect here; it needs {what}"
    with pytest.raises(InputError, match=wanted):
        tensorfold.Recipe.from_dict({"fold": [{"targets": "mlp", "method": "low-rank", "rank": 4}], "heal": settings})
    for given in ({"settings": HealSettings(**settings)}, settings):
        with pytest.raises(InputError, match=wanted):
            tensorfold.heal(student, "text", teacher=tensorfold.load(student.name_or_path), **given)
    pairs = [f"--set={key}={list(value) if isinstance(value, tuple) else value}" for key, value in settings.items()]
    outcome = command("heal", "nowhere", "--train", "text", "--teacher", "dense", *pairs)
    assert (outcome.status, wanted in outcome.err) == (2, True), outcome.err


def test_an_option_may_change_a_single_stage_and_has_to_change_one(command, tmp_path):
    recipe = tmp_path / "r.yaml"
    stages = [{"text": "t", "steps": 0, "blockwise_tokens": 64}, {"text": "t", "steps": 5}]
    recipe.write_text(yaml.safe_dump({"layers": [0], "heal": stages}))
    assert "no effect" not in command("heal", "nowhere", "--recipe", recipe, "--lr", "0.1", "--teacher", "d").err
    recipe.write_text(yaml.safe_dump({"layers": [0], "heal": stages[:1]}))
    outcome = command("heal", "nowhere", "--recipe", recipe, "--lr", "0.1", "--teacher", "d")
    assert (outcome.status, "lr has no effect here; it needs steps above 0" in outcome.err) == (2, True)


@pytest.mark.parametrize(
    "arguments",
    [("--set", "lr=1", "--lr", "2"), ("--set", "kl=1", "--set", "kl=2"), ("--set", "text=x", "--train", "y")],
    ids=" ".join,
)
def test_a_setting_given_twice_is_refused(refused, arguments):
    refused("heal", "nowhere", "--train", "t", *arguments, says=["needed one of the two"])


@pytest.mark.parametrize(
    ("method", "settings", "needed"),
    [
        ("kronecker", {"factor": (4, 4), "seed": 3}, "seed has no effect here; it needs init: random"),
        ("kronecker", {"factor": (4, 4), "epsilon": 0.1}, "epsilon has no effect here; it needs init: prune"),
        ("kronecker", {"keep": 0.5, "init": "data-aware", "refine": True}, "refine has no effect here"),
        ("mpo", {"bond": 4, "seed": 3}, "seed has no effect here; it needs init: random"),
    ],
)
def test_a_setting_of_a_method_that_another_switches_off_is_refused(method, settings, needed):
    with pytest.raises(InputError, match=f"{method}: {needed}"):
        METHODS[method](**settings)


AUTO = {"effort": "high", "floor": 0.2, "budget": "bytes"}


@pytest.mark.parametrize("name", AUTO)
def test_what_only_text_makes_a_difference_to_needs_text(tiny, dense_directory, command, tmp_path, name):
    recipe = {"fold": [{"targets": "mlp", "method": "auto", "keep": 0.5, name: AUTO[name]}]}
    wanted = f"auto: {name} has no effect here; it needs calibration text"
    with pytest.raises(InputError, match=wanted):
        tensorfold.fold(tiny("llama"), recipe)
    with pytest.raises(InputError, match=wanted):
        tensorfold.fold_directory(dense_directory, recipe, tmp_path / "out")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**recipe, "calibrate": {"text": "python-docs"}}))
    arguments = ("--recipe", tmp_path / "r.yaml", "--calibrate", "none", "--json")
    assert command("fold", dense_directory, *arguments, "--out", tmp_path / "without").status == 0, "asked for"


@pytest.mark.parametrize("name", AUTO)
def test_what_only_linear_layers_make_a_difference_to_needs_some(tiny, tokenizer, prose, name):
    recipe = {"fold": [{"targets": "embedding", "method": "auto", "keep": 0.5, name: AUTO[name]}]}
    with pytest.raises(InputError, match=f"{name} has no effect here; it needs a linear layer"):
        tensorfold.fold(tiny("llama"), recipe, tokenizer, [prose], calibration_tokens=256)


@pytest.mark.parametrize(
    ("entry", "needed"),
    [
        ({"targets": "embedding", "method": "token-mps", "rank": 1}, "token-mps looks at no text"),
        ({"targets": "embedding", "method": "mpo", "bond": 4, "init": "tt-svd"}, "mpo looks at no text"),
        ({"targets": "attention", "method": "kronecker", "keep": 0.5, "permute": "hidden"}, "permute has no effect"),
    ],
)
def test_what_no_target_makes_use_of_is_refused(tiny, tokenizer, prose, entry, needed):
    with pytest.raises(InputError, match=needed):
        tensorfold.fold(tiny("llama"), {"fold": [entry]}, tokenizer, [prose], calibration_tokens=256)


def test_text_for_dropping_layers_alone_is_refused(tiny, tokenizer, prose):
    with pytest.raises(InputError, match="calibration text has no effect here"):
        tensorfold.fold(tiny("llama"), {"layers": [0]}, tokenizer, [prose])


@pytest.mark.parametrize(
    ("entries", "needed"),
    [
        ([{"targets": "mlp", "exclude": "q_proj"}], r"fold\[0\].*exclude: q_proj has no effect"),
        ([{"targets": "mlp"}, {"targets": "up_proj"}], r"fold\[1\].*targets: up_proj.*has no effect: entries before"),
    ],
)
def test_an_entry_that_changes_nothing_is_refused(tiny, entries, needed):
    half = {"method": "low-rank", "keep": 0.5}
    with pytest.raises(InputError, match=needed):
        tensorfold.plan(tiny("llama"), {"fold": [{**entry, **half} for entry in entries]})


@pytest.mark.parametrize(
    "keyword", [{"calibration_tokens": 300}, {"checkpoint": "kept"}], ids=lambda each: next(iter(each))
)
def test_keywords_of_fold_that_only_text_makes_a_difference_to(tiny, tokenizer, keyword):
    with pytest.raises(InputError, match=f"{next(iter(keyword))}.* has no effect here; it needs calibration text"):
        tensorfold.fold(tiny("llama"), tensorfold.LowRank(keep=0.5), tokenizer, **keyword)


def test_keywords_of_healing_and_evaluation(student, tokenizer):
    with pytest.raises(InputError, match="card has no effect here; it needs out"):
        tensorfold.heal(student, "text", card={})
    with pytest.raises(InputError, match="text_name and progress have no effect"):
        tensorfold.evaluate(student, tokenizer, protocol="lm-eval", tasks=["t"], text_name="x")


@pytest.mark.parametrize("setting", [{"tokens": (1, 16)}, {"way": "chain"}], ids=str)
def test_settings_of_single_layers_need_folded_ones(tiny, setting):
    with pytest.raises(InputError, match="has no effect here; it needs folded layers"):
        tensorfold.bench(tiny("llama"), rounds=1, memory=False, prefill=8, decode=1, **setting)
