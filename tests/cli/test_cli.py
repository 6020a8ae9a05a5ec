"""The command line: its output and messages, the files it writes, and its exit status."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import tensorfold
from tensorfold.recipes.recipe import shipped_recipes

EVAL = ("--protocol", "disjoint-64", "--max-tokens", "256")
MODULE = {"out_modes", "in_modes", "ranks", "parameters", "bytes"}


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def parse_only_line(text: str) -> dict:
    assert text.count("\n") == 1
    return json.loads(text)


@pytest.fixture
def recipe_file(tmp_path, text_file) -> Path:
    path = tmp_path / "own.yaml"
    entries = [
        {"targets": "embedding", "method": "low-rank", "rank": 8},
        {"targets": "mlp", "method": "kronecker", "keep": 0.5, "exclude": {"regex": r"layers\.1\.mlp\.down"}},
        {"targets": ["q_proj", "o_proj"], "method": "mpo", "sites": 2, "bond": 8},
    ]
    recipe = {"fold": entries, "calibrate": {"text": str(text_file), "tokens": 256}}
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def test_plan_prints_a_table_of_what_a_fold_would_do(command, dense_directory):
    outcome = command("plan", dense_directory, "--keep", "0.5", "--targets", "mlp,q_proj")
    assert outcome.status == 0
    assert outcome.err == ""
    planned = tensorfold.plan(tensorfold.load(dense_directory), tensorfold.Recipe.keep(0.5, ["mlp", "q_proj"]))
    assert outcome.out == f"{planned}\n"
    assert "model.layers.*.mlp.up_proj" in outcome.out
    assert f"{planned.parameters_before:,} → {planned.parameters_after:,} parameters" in outcome.out


def test_plan_as_json_has_the_keys_of_the_contract(command, dense_directory, recipe_file):
    outcome = command("plan", dense_directory, "--recipe", recipe_file, "--json")
    result = parse_only_line(outcome.out)
    sizes = {f"{what}_{when}" for what in ("parameters", "bytes", "macs") for when in ("before", "after")}
    assert set(result) == {*sizes, "modules"}
    assert all(set(module) == MODULE for module in result["modules"].values())
    assert result["modules"]["model.embed_tokens"] == {
        "out_modes": [300, 1], "in_modes": [1, 32], "ranks": [8], "parameters": 8 * 332,
        "bytes": 4 * 8 * 332,
    }  # fmt: skip
    assert "model.layers.1.mlp.down_proj" not in result["modules"]
    assert result["parameters_before"] == tensorfold.load(dense_directory).num_parameters()


def test_plan_needs_no_weights(command, tmp_path, dense_directory):
    (tmp_path / "config.json").write_bytes((dense_directory / "config.json").read_bytes())
    with_weights = command("plan", dense_directory, "--keep", "0.5", "--json")
    assert command("plan", tmp_path, "--keep", "0.5", "--json") == with_weights


def test_plan_says_what_a_size_means(command, dense_directory):
    whole = json.loads(command("plan", dense_directory, "--keep", "0.5", "--json").out)["parameters_before"]
    outcome = command("plan", dense_directory, "--size", "0.8", "--json")
    found = json.loads(outcome.out)
    assert outcome.status == 0
    assert found["parameters_before"] == whole
    assert 0.75 * whole < found["parameters_after"] <= 0.8 * whole
    assert found["macs_after"] < found["macs_before"]
    assert found["bytes_about"] == 4 * found["parameters_after"]
    same = json.loads(command("plan", dense_directory, "--bytes", str(found["bytes_about"]), "--json").out)
    assert same["bits"] == 32
    assert 0.95 * found["parameters_after"] < same["parameters_after"] <= found["parameters_after"]
    shown = command("plan", dense_directory, "--size", "0.8")
    assert "multiply–adds a token" in shown.out
    assert command("plan", dense_directory, "--size", "0.8", "--keep", "0.5").status == 2
    assert command("plan", "--size", "0.8").status == 2


def test_fold_writes_a_model_that_plan_announced(command, dense_directory, recipe_file, tmp_path):
    out = tmp_path / "deep" / "folded"
    planned = json.loads(command("plan", dense_directory, "--recipe", recipe_file, "--json").out)
    outcome = command("fold", dense_directory, "--recipe", recipe_file, "--out", out, "--json")
    assert outcome.status == 0, outcome.err
    result = parse_only_line(outcome.out)
    assert {"parameters_before", "parameters_after", "modules"} <= set(result)
    for name, module in planned["modules"].items():
        done = result["modules"][name]
        assert {key: done[key] for key in MODULE} == module
        assert 0 <= done["error"] < 1
    assert result["calibration_tokens"] == 256
    assert [path.name for path in out.parent.iterdir()] == ["folded"]
    assert tensorfold.load(out).num_parameters() == result["parameters_after"] == planned["parameters_after"]


def test_the_readme_of_a_folded_model_opens_with_code_that_loads_it(command, dense_directory, tmp_path):
    out = tmp_path / "folded"
    assert command("fold", dense_directory, "--keep", "0.5", "--out", out).status == 0
    first = (out / "README.md").read_text(encoding="utf-8").split("```")[1].removeprefix("python\n")
    assert first.startswith("import tensorfold\n")
    scope: dict = {"PATH": out}
    exec(first, scope)
    assert scope["model"].num_parameters() < tensorfold.load(dense_directory).num_parameters()
    card = json.loads((out / "tensorfold.json").read_text(encoding="utf-8"))
    assert card["base_model"] == dense_directory.name
    assert card["recipe"] == "--keep 0.5 --targets mlp"


@pytest.mark.parametrize("from_disk", [True, False])
def test_a_fold_without_text_needs_no_tokenizer(command, refused, dense_directory, text_file, tmp_path, from_disk):
    bare = tmp_path / "bare"
    model = tensorfold.load(dense_directory)
    model.save_pretrained(bare)
    keep = ("--keep", "0.5", *(() if from_disk else ("--dtype", "float32")))
    outcome = command("fold", bare, *keep, "--out", tmp_path / "out", "--json")
    assert "written without a tokenizer" in outcome.err
    folded = tensorfold.load(tmp_path / "out")
    assert tensorfold.fold(model, tensorfold.Recipe.keep(0.5)).parameters_after == folded.num_parameters()
    for name, tensor in model.state_dict().items():
        assert folded.state_dict()[name].equal(tensor)
    command("plan", bare, "--keep", "0.5")
    command("export", tmp_path / "out", "--to", "int8", "--out", tmp_path / "int8")
    command("report", tmp_path / "out", "--no-samples", "--out", tmp_path / "report.html")
    refused("fold", bare, *keep, "--calibrate", text_file, "--out", tmp_path / "two", says=["bare", "tokenizer"])


def test_calibrate_option_wins_over_the_recipe_and_none_folds_without(
    command, dense_directory, recipe_file, text_file, tmp_path
):
    def fold(name, *options):
        outcome = command("fold", dense_directory, "--out", tmp_path / name, "--json", *options)
        return parse_only_line(outcome.out)

    metric = {
        name: {module["metric"] for module in fold(name, *options)["modules"].values()}
        for name, options in {
            "calibrated": ("--keep", "0.5", "--calibrate", text_file, "--tokens", "300"),
            "without": ("--recipe", recipe_file, "--calibrate", "none"),
        }.items()
    }
    assert metric == {"calibrated": {"loss"}, "without": {"weight"}}
    card = json.loads((tmp_path / "calibrated" / "tensorfold.json").read_text(encoding="utf-8"))
    assert card["calibration"] == f"{card['calibration_tokens']} tokens of prose.txt"
    assert 256 <= card["calibration_tokens"] <= 300


def test_calibration_lowers_the_error_on_the_calibration_text(command, dense_directory, text_file, tmp_path):
    def cores(name, *options):
        command("fold", dense_directory, "--keep", "0.5", "--out", tmp_path / name, *options)
        return tensorfold.load(tmp_path / name).get_submodule("model.layers.0.mlp.up_proj").to_dense()

    assert not torch.allclose(cores("plain"), cores("aware", "--calibrate", text_file, "--tokens", "256"), atol=1e-5)


def test_eval_as_json_has_the_keys_of_the_contract(command, folded_directory, text_file):
    outcome = command("eval", folded_directory, "--text", text_file, *EVAL, "--json")
    assert outcome.status == 0, outcome.err
    result = parse_only_line(outcome.out)
    assert {"perplexity", "tokens", "protocol", "text", "seconds", "parameters"} <= set(result)
    assert result["protocol"] == "disjoint-64"
    assert result["text"] == "prose.txt"
    assert result["tokens"] == 256 - 256 // 64
    assert result["parameters"] == tensorfold.load(folded_directory).num_parameters()


def test_eval_prints_perplexity_with_its_protocol(command, dense_directory, text_file):
    outcome = command("eval", dense_directory, "--text", text_file, *EVAL)
    assert outcome.out.startswith("perplexity ")
    assert "disjoint-64, prose.txt, 252 tokens" in outcome.out


def test_recipes_are_listed_with_their_headline(command):
    outcome = command("recipes")
    assert [line.split()[0] for line in outcome.out.splitlines()] == shipped_recipes()
    assert all(len(line.split()) > 3 for line in outcome.out.splitlines())


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_parse_and_open_with_their_launch_command(command, name):
    content = command("recipes", name).out
    opening = content[: re.search(r"^\w", content, flags=re.M).start()]
    assert re.search(rf"^#   tensorfold fold .*--recipe {name} --out \S+$", opening, flags=re.M)
    measured = re.search(r"^#.*\bMeasured here\b(.*)", opening, flags=re.M | re.S)
    assert measured, "what the recipe has been measured to give"
    studies = Path(__file__).parents[2] / "studies"
    logs = re.findall(r"studies/(\S+\.jsonl)", measured[1])
    assert all((studies / log).is_file() for log in logs)
    assert re.search(r"\d", measured[1] if logs else opening), "a figure"
    assert logs or "parameter count" in measured[1], "the log that a figure is from"
    assert tensorfold.Recipe.load(name) == tensorfold.Recipe.load(name)
    assert tensorfold.Recipe.from_dict(yaml.safe_load(content)).fold == tensorfold.Recipe.load(name).fold


def test_a_recipe_is_copied_once_and_never_over_a_file(command, refused, tmp_path):
    copy = tmp_path / "mine.yaml"
    outcome = command("recipes", "low-rank-80", "--copy", copy)
    assert (outcome.status, outcome.out) == (0, "")
    assert copy.read_text(encoding="utf-8") == command("recipes", "low-rank-80").out
    copy.write_text("edited", encoding="utf-8")
    refused("recipes", "low-rank-80", "--copy", copy, says=["mine.yaml", "exists"])
    assert copy.read_text(encoding="utf-8") == "edited"


def test_unknown_recipe_names_the_nearest(refused):
    refused("recipes", "low-rank-08", says=["low-rank-08", "did you mean 'low-rank-80'"])
    refused("recipes", "--copy", "x", says=["--copy has no effect", "needs the name of a shipped recipe"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], ["command", "tensorfold --help"]),
        (["flod"], ["flod", "tensorfold --help"]),
        (["plan", "m", "--kep", "0.5"], ["--kep", "tensorfold plan --help"]),
        (["fold", "m", "--keep", "0.5"], ["--out", "tensorfold fold --help"]),
        (["fold", "m", "--keep", "half", "--out", "o"], ["--keep", "number"]),
        (["fold", "m", "--keep", "0.5", "--out", "o", "--tokens", "1"], ["--tokens", "2"]),
        (["eval", "m"], ["--text"]),
        (["eval", "m", "--text", "python-docs", "--protocol", "hf-1204"], ["hf-1204", "did you mean 'hf-1024'"]),
        (["plan", "m"], ["neither of --recipe and --keep"]),
        (["plan", "m", "--keep", "0.5", "--recipe", "demo"], ["both of --recipe and --keep"]),
        (
            ["plan", "m", "--recipe", "demo", "--targets", "mlp"],
            ["--targets has no effect", "needs --keep"],
        ),
        (["plan", "--keep", "0.5"], ["no MODEL given"]),
    ],
)
def test_bad_usage_is_one_line_and_status_2(refused, arguments, says):
    refused(*arguments, says=says)


def test_failures_end_with_1_and_say_so(command, dense_directory, monkeypatch):
    def broken(*_):
        raise tensorfold.TensorfoldError("the fit did not converge")

    monkeypatch.setattr("tensorfold.folding.plan.plan", broken)
    outcome = command("plan", dense_directory, "--keep", "0.5")
    assert (outcome.status, outcome.out, outcome.err) == (1, "", "tensorfold: the fit did not converge\n")


def test_defects_end_with_1_and_ask_for_debug(command, dense_directory, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("tensorfold.folding.plan.plan", broken)
    outcome = command("plan", dense_directory, "--keep", "0.5")
    assert outcome.status == 1
    assert outcome.err == (
        "tensorfold: unexpected ZeroDivisionError: two lines; run again with --debug and report what it prints\n"
    )


def test_version(command):
    assert command("--version").out == f"tensorfold {tensorfold.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["fold", "-h"], ["report", "--help"]])
def test_help_does_not_wait_for_torch(arguments):
    code = (
        "import sys; from tensorfold.cli.main import run\n"
        f"try: run({arguments!r})\n"
        "except SystemExit as end: print('status', end.code)\n"
        "print('heavy:', sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = run_python("-c", code)
    assert done.stdout.endswith("status 0\nheavy: []\n"), done.stderr
    assert "Usage: tensorfold" in done.stdout


def test_as_a_process_usage_errors_are_one_line():
    done = run_python("-m", "tensorfold.cli.main", "plan", "--xyzzy")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "tensorfold: No such option: --xyzzy; see tensorfold plan --help\n"


def test_debug_shows_the_traceback_of_bad_input():
    done = run_python("-m", "tensorfold.cli.main", "recipes", "--debug", "low-rank-08")
    assert done.returncode != 0
    assert "Traceback (most recent call last)" in done.stderr
    assert "tensorfold.errors.InputError: recipe " in done.stderr


def test_as_a_process_json_has_standard_output_to_itself(dense_directory, text_file, tmp_path):
    script = Path(sys.executable).with_name("tensorfold")
    launch = [str(script)] if script.is_file() else [sys.executable, "-m", "tensorfold.cli.main"]
    out = str(tmp_path / "o")
    options = ["--keep", "0.5", "--calibrate", str(text_file), "--tokens", "256", "--out", out, "--json"]
    launch += ["fold", str(dense_directory), *options]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert parse_only_line(done.stdout)["out"] == out
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["absent", "empty", "unset"])
def test_a_wrong_data_directory_stops_the_whole_test_session(tmp_path, kind):
    (tmp_path / "empty").mkdir()
    value = {"absent": str(tmp_path / "absent"), "empty": str(tmp_path / "empty"), "unset": ""}[kind]
    here = Path(__file__).parents[1]
    done = run_python("-m", "pytest", "--collect-only", str(here / "conftest.py"), "-p", "no:cacheprovider",
                      TENSORFOLD_DATA=value)  # fmt: skip
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"TENSORFOLD_DATA={value!r} is not a directory with files in it" in done.stderr
