"""``compress`` on a tiny model: what it writes is what the other commands write, and a killed run ends in the same."""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

import tensorfold
from tensorfold.cli.main import run
from tensorfold.cli.outcome import Outcome, Row
from tensorfold.cli.pipeline import Order
from tensorfold.cli.sizes import aim_at, bytes_of
from tensorfold.cli.steps import Steps
from tensorfold.errors import InputError
from tensorfold.recipes.recipe import Recipe
from tensorfold.utils.fingerprints import hash_file

GIVEN = ("--size", "0.8", "--tokens", "600", "--max-tokens", "300", "--unseen", "python-docs", "--effort", "low")


@pytest.fixture(scope="module")
def arguments(dense_directory, text_file):
    return ("compress", str(dense_directory), "--text", str(text_file), *GIVEN)


def quicken(patch):
    """Fewer measurements of speed, and two steps of healing or three, by no clock."""
    patch.setattr("tensorfold.cli.pipeline._ROUNDS", 1)
    patch.setattr("tensorfold.cli.pipeline._DECODED", 2)
    patch.setattr("tensorfold.cli.minutes._FEWEST", 1)
    patch.setattr("tensorfold.cli.minutes._window_seconds", lambda *_: 5.0)
    patch.delenv("TENSORFOLD_DATA", raising=False)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quicken(monkeypatch)


def weights(directory):
    """Hashes of everything that holds no time."""
    kinds = (".safetensors", ".yaml", ".txt")
    files = [path for path in Path(directory).rglob("*") if path.is_file()]
    kept = [p for p in files if p.suffix in kinds or p.parent.name == "text" or p.name in ("config.json", "README.md")]
    return {path.relative_to(directory).as_posix(): hash_file(path) for path in kept}


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """The directory of a run to its end, with half a minute of healing."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        with pytest.raises(SystemExit):
            run([*arguments, "--minutes", "0.5", "--out", str(out)])
    return out


def test_the_outcome_has_every_row(whole):
    found = json.loads((whole / "compress.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in found["rows"]] == ["dense", "dense, 8 bits", "folded and healed"]
    dense, result = found["rows"][0], found["rows"][-1]
    assert result["parameters"] == tensorfold.load(whole / "healed").num_parameters()
    assert result["parameters"] < 0.81 * dense["parameters"]
    assert 4 * result["parameters"] <= result["bytes"] < 4.1 * result["parameters"]  # orders of rows
    assert all(row[key] > 0 for row in found["rows"] for key in ("own", "unseen", "prompt", "decode"))
    assert [sample["label"] for sample in found["samples"]] == [row["name"] for row in found["rows"]]
    assert all(sample["tokens"] > 0 or sample["problem"] for sample in found["samples"])
    assert found["report"] == str(whole / "report.html")
    assert (whole / "report.html").is_file()


def test_every_step_wrote_what_its_command_writes(whole, arguments, command, tmp_path):
    recipe = whole / "recipe.yaml"
    assert command("fold", arguments[1], "--recipe", recipe, "--out", tmp_path / "again").status == 0
    assert weights(tmp_path / "again") == weights(whole / "folded")
    assert command("export", arguments[1], "--to", "int8", "--out", tmp_path / "int8").status == 0
    assert weights(tmp_path / "int8") == weights(whole / "dense-8")
    assert json.loads((whole / "healed" / "tensorfold.json").read_text(encoding="utf-8"))["heal"]["steps"] == 2


def test_the_same_command_does_nothing_again(whole, arguments, command):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    outcome = command(*arguments, "--minutes", "0.5", "--out", whole, "--json")
    assert outcome.status == 0, outcome.err
    assert outcome.err.count("done before") == outcome.err.count("/10]") == 10
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
    assert json.loads(outcome.out) == json.loads((whole / "compress.json").read_text(encoding="utf-8"))


def killed_at_rename(number, *arguments):
    """Run in a child process that dies just before it moves its ``number``-th file or directory into place."""
    child = os.fork()
    if child == 0:
        moves = 0

        def hook(event, _):
            nonlocal moves
            if event == "os.rename":
                moves += 1
                if moves == number:
                    os._exit(9)

        sys.addaudithook(hook)
        try:
            run([str(argument) for argument in arguments])
        except SystemExit as error:
            os._exit(int(error.code or 0))
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_killed_run_ends_in_the_same_files(whole, arguments, command, tmp_path):
    out = tmp_path / "out"
    for number in (3, 6, 11):
        assert killed_at_rename(number, *arguments, "--minutes", "0.5", "--out", out) == 9
    outcome = command(*arguments, "--minutes", "0.5", "--out", out)
    assert outcome.status == 0, outcome.err
    assert "done before" in outcome.err
    then, now = weights(whole), weights(out)
    moved = {"recipe.yaml", "folded/README.md", "healed/README.md"}  # they name the directory
    assert {name: value for name, value in now.items() if name not in moved} == {
        name: value for name, value in then.items() if name not in moved
    }


def test_a_step_of_another_setting_is_done_anew_with_the_reason(whole, arguments, command, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    outcome = command(*arguments, "--minutes", "0.7", "--out", out)
    assert outcome.status == 0, outcome.err
    assert "fold: " in outcome.err
    lines = [line.partition("] ")[2] for line in outcome.err.splitlines() if line.startswith("[")]
    assert lines[2].endswith("done before")
    assert "anew: minutes was 0.5, is 0.7" in lines[3]
    assert lines[5].endswith("done before")
    assert "anew: a step before it was done anew" in lines[6]


def test_a_changed_output_is_done_anew(tmp_path):
    steps, output = Steps(tmp_path, ["a"]), tmp_path / "file"
    steps.run("a", "write", {"x": 1}, lambda: output.write_text("one"), output)
    output.write_text("two")
    steps.run("a", "write", {"x": 1}, lambda: output.write_text("one"), output)
    assert output.read_text() == "one"


def test_a_directory_of_something_else_is_refused(refused, arguments, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    refused(*arguments, "--out", tmp_path / "out", says=["already exists"])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--size", "0.5", "--bytes", "1MB"), ["both"]),
        ((), ["neither"]),
        (("--size", "1.5"), ["0 < size < 1"]),
        (("--size", "0.01"), ["needed more than 0."]),
        (("--bytes", "many"), ["60MB"]),
        (("--bytes", "1GB"), ["has that size already", "nothing to fold"]),
        (("--bytes", "1GB", "--bits", "8"), ["has that size already", "export MODEL --to int8 does it"]),
        (("--bytes", "1kB"), ["takes more than that"]),
        (("--size", "0.8", "--bits", "4"), ["--to transformers; needed one of 32, 8"]),
        (("--size", "0.8", "--text", "nowhere"), ["no text 'nowhere'"]),
        (("--size", "0.8", "--text", "self", "--text", "python-docs"), ["--unseen"]),
        (("--size", "0.8", "--text", "python-docs", "--unseen", "python-docs"), ["twice"]),
        (("--size", "0.8", "--plain", "--targets", "mlp"), ["targets", "without --plain"]),
        (("--size", "0.8", "--targets", "mpl"), ["mpl"]),
        (("--size", "0.2", "--targets", "mlp"), ["what is not folded takes more"]),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_runs(refused, dense_directory, workplace, given, says):
    refused("compress", dense_directory, *given, "--out", "out", says=says)
    assert os.listdir(workplace) == []


@pytest.mark.parametrize(
    ("text", "count"), [("60MB", 60 * 10**6), ("1.5 KiB", 1536), ("42", 42), ("2GiB", 2**31), ("7kB", 7000)]
)
def test_bytes_of(text, count):
    assert bytes_of(text) == count


def test_a_size_is_that_of_the_plan(tiny):
    model = tiny("llama")
    recipe = Recipe.keep(0.5, "all-linear")
    aim = aim_at(model.config, recipe, "transformers", None, 0.8, None)
    assert aim.plan.parameters_after == pytest.approx(0.8 * aim.plan.parameters_before, rel=0.02)
    assert aim.plan.macs_before == sum(m.weight.numel() for m in model.modules() if type(m).__name__ == "Linear")
    assert str(aim.plan.macs_after)[:2] in str(aim).replace(",", "")
    least = aim.bytes_in(8, dense=True)
    by_bytes = aim_at(model.config, recipe, "onnx", None, None, round(0.9 * 1.125 * least))
    assert by_bytes.bits == 8
    assert by_bytes.bytes_in(8) <= 0.9 * 1.125 * least


def test_few_bytes_take_fewer_bits(tiny):
    model = tiny("llama", vocab_size=8)
    recipe, whole = Recipe.keep(0.5, "mlp"), sum(parameter.numel() for parameter in model.parameters())
    taken = [aim_at(model.config, recipe, "openvino", None, None, round(each * whole)).bits for each in (0.9, 0.5)]
    assert taken == [8, 4]


def row(name, size, perplexity, ours=False, prompt=100.0):
    return Row(name, f"at/{name}", ours, size, size, perplexity, perplexity, prompt, 10.0)


@pytest.mark.parametrize(
    ("rows", "pays", "says"),
    [
        ([row("dense", 400, 10), row("dense, 8 bits", 100, 10), row("ours", 90, 11, True, 140)], True, "1.40 times as"),
        ([row("dense", 400, 10), row("dense, 8 bits", 100, 10), row("ours", 110, 11, True)], False, "Take at/dense, 8"),
        (
            [
                row("dense", 400, 10),
                row("dense, 8 bits", 100, 10),
                row("dense, 4 bits", 60, 12),
                row("ours", 90, 11, True),
            ],
            True,
            "0.90 of dense, 8 bits",
        ),
        (
            [
                row("dense", 400, 10),
                row("dense, 8 bits", 100, 10),
                dataclasses.replace(row("dense, 4 bits", 60, 10.5), own=20.0),
                row("ours", 90, 11, True),
            ],
            False,
            "It depends on the text whether folding pays. Dense, 4 bits, takes 0.0 MB against 0.0, and has a "
            "perplexity of 20.00 against 11.00 on held-out text and 10.50 against 11.00 on unseen. The result: 0.0 M",
        ),
    ],
)
def test_the_verdict_is_that_of_the_rows(rows, pays, says):
    outcome = Outcome({"texts": (), "most": None}, {"bits": 8}, rows, "own", "other", "A tool", [], "out", None)
    assert outcome.to_dict()["pays"] is pays
    assert says in outcome.verdict
    assert says in str(outcome)


def test_what_graphs_round_to_is_said_beside_their_speeds():
    rows = [row("dense", 400, 10).timed(5, 2, ""), row("ours", 90, 11, True).timed(9, 3, "bfloat16")]
    order = {"texts": (), "most": None, "engine": "openvino"}
    outcome = Outcome(order, {"bits": 32}, rows, "own", "other", "A tool", [], "out", None)
    said = "Graphs were timed in bfloat16, as openvino computes on this processor"
    assert said in str(outcome)
    assert outcome.to_dict()["rounding"].startswith(said)
    rows = [rows[0], rows[1].timed(9, 3, "float32")]
    assert not dataclasses.replace(outcome, rows=rows).rounding


def test_more_bytes_than_were_asked_for_are_owned_up_to():
    rows = [row("dense", 400, 10), row("dense, 8 bits", 100, 10), row("ours", 90, 11, True)]
    said = "The result takes 90 bytes, more than the 80 asked for"
    for most in (80, 90, None):
        outcome = Outcome({"texts": (), "most": most}, {"bits": 8}, rows, "own", "other", "A tool", [], "out", None)
        assert (said in outcome.verdict) is (most == 80)


def test_an_overlap_of_texts_is_said_with_its_share():
    rows = [row("dense", 400, 10), dataclasses.replace(row("ours", 90, 11, True), seen=0.25)]
    outcome = Outcome({"texts": (), "most": None}, {"bits": 32}, rows, "own", "other", "A tool", [], "out", None)
    assert "About 25% of a text that was judged by" in str(outcome)


def test_sizes_need_a_fraction_of_something(tiny):
    with pytest.raises(InputError, match="what is not folded takes more"):
        aim_at(tiny("llama").config, Recipe.keep(0.5, "mlp"), "transformers", None, 0.1, None)


@pytest.mark.parametrize(
    ("engine", "architecture", "targets"),
    [
        ("transformers", "qwen3_moe", "all-linear,experts"),
        ("onnx", "qwen3_moe", "all-linear"),  # graphs of folded experts cannot be traced
        ("transformers", "llama", "all-linear"),
    ],
)
def test_experts_in_one_tensor_are_folded_with_the_rest(engine, architecture, targets, tiny):
    order = Order("m", 0.5, None, (), "", 0.0, engine, None, False, "low", 300, 300)
    assert order.recipe(tiny(architecture).config).fold[0].targets == targets
    named = dataclasses.replace(order, targets="mlp,attention")
    assert named.recipe(tiny(architecture).config).fold[0].targets == "mlp,attention"


def test_plan_and_compress_mean_the_same_by_a_size(command, mixture_directory):
    planned = json.loads(command("plan", mixture_directory, "--size", "0.6", "--json").out)
    order = Order(str(mixture_directory), 0.6, None, (), "", 0.0, "transformers", None, False, "low", 300, 300)
    config = tensorfold.load(mixture_directory).config
    assert planned == aim_at(config, order.recipe(config), "transformers", None, 0.6, None).to_dict()
    assert planned["targets"] == "all-linear,experts"
    assert planned["parameters_after"] == pytest.approx(0.6 * planned["parameters_before"], rel=0.05)
    assert "2 experts of a layer for each token" in command("plan", mixture_directory, "--size", "0.6").out
    table = command("plan", mixture_directory, "--keep", "0.5", "--targets", "experts").out
    assert table.count("model.layers.*.mlp.experts.down_proj.*") == 1
    kept = command("plan", mixture_directory, "--keep", str(planned["keep"]), "--targets", planned["targets"], "--json")
    same = json.loads(kept.out)
    assert all(planned[key] == same[key] for key in planned.keys() & same.keys())
