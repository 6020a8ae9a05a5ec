"""The HTML report: what stands in it, that it needs and runs nothing else, and what a real browser makes of it."""

import base64
import dataclasses
import hashlib
import json
import os
import re
import shutil

import pytest

import tensorfold
from browser import CHROMIUM, Page, look
from tensorfold import MPO, Auto, LowRank, Recipe, Rule, TokenMPS, write_report
from tensorfold.errors import InputError
from tensorfold.export.checkpoints import export_int8
from tensorfold.hf.loading import save
from tensorfold.report import page
from tensorfold.utils.records import BENCH, CARD, EVALUATIONS, HEAL_LOG, record_evaluation

PROMPT = "The quick"
HOSTILE = '"><img src=x onerror="pwned()"></script><script>pwned()</script>{{ 7 * 7 }}<a href="javascript:pwned()">'


@dataclasses.dataclass
class Models:
    dense: object
    folded: object
    healed: object

    @property
    def all(self):
        return [self.dense, self.folded, self.healed]


@pytest.fixture(scope="session")
def models(tiny, tokenizer, dense_directory, prose, text_file, tmp_path_factory):
    """A dense model, the same folded, and that healed a few steps; with perplexities. Not to be changed."""
    home = tmp_path_factory.mktemp("report")
    dense, folded, healed = (home / name for name in ("dense", "folded", "healed"))
    shutil.copytree(dense_directory, dense)
    model = tiny("llama")
    rules = (
        Rule("embedding", TokenMPS(modes=(2,) * 5, rank=2)),
        Rule("mlp", LowRank(keep=0.5)),
        Rule("attention", MPO(bond=4, sites=3)),
    )
    report = tensorfold.fold(model, Recipe(rules), tokenizer, [prose], calibration_tokens=256)
    save(model, tokenizer, folded, {"base_model": "dense", "recipe": "three-ways", **report.to_dict()})
    options = {"steps": 3, "batch": 2, "block": 16, "lr": 1e-3, "validation_fraction": 0.1, "blockwise_tokens": 128}
    tensorfold.heal(tensorfold.load(folded), text_file, tiny("llama"), tokenizer=tokenizer, out=healed, **options)
    card = json.loads((healed / CARD).read_text())
    card.update(json.loads((folded / CARD).read_text()))
    (healed / CARD).write_text(json.dumps(card))
    for path in (dense, folded, healed):
        note(path, tensorfold.evaluate(tensorfold.load(path), tokenizer, prose, "disjoint-64", max_tokens=512))
    return Models(dense, folded, healed)


def note(path, evaluation):
    record_evaluation(path, {**evaluation.to_dict(), "text": "prose.txt"})


@pytest.fixture(scope="session")
def written(models, tmp_path_factory):
    """The report on all three, with samples."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    write_report(models.all, out, prompt=PROMPT, tokens=8)
    return out


@pytest.fixture
def copy(models, tmp_path):
    """``copy("folded")``: one of the models, to be changed."""
    return lambda name: shutil.copytree(getattr(models, name), tmp_path / name)


def parse(path):
    return Page(path.read_text(encoding="utf-8"))


def report(paths, out, **options):
    write_report(paths, out, **{"prompt": None, **options})
    return parse(out)


def test_sizes_and_perplexities_stand_with_what_they_are_of(written, models):
    text = parse(written).text
    before, after = (tensorfold.load(path).num_parameters() for path in (models.dense, models.folded))
    assert after < before
    assert f"{before:,} {after:,} {after / before:.1%}" in text
    size = sum(file.stat().st_size for file in models.folded.glob("*.safetensors"))
    assert f"{size / 1e6:,.1f} MB" in text
    assert "three-ways" in text
    noted = [json.loads((path / EVALUATIONS).read_text()) for path in models.all]
    assert f"disjoint-64, prose.txt, {noted[0]['tokens']:,} predicted tokens" in text
    for each in noted:
        ratio = each["perplexity"] / noted[0]["perplexity"]
        assert f"{each['perplexity']:,.2f} {ratio:.2f}" in text


def test_the_error_map_has_a_cell_for_every_folded_matrix_in_a_block(written, models):
    drawn = parse(written).figures["errors-1"]["data"][0]
    errors = {
        name: module["error"] for name, module in json.loads((models.folded / CARD).read_text())["modules"].items()
    }
    cells = {
        f"model.layers.{block}.{matrix}": value
        for block, line in zip(drawn["y"], drawn["z"], strict=True)
        for matrix, value in zip(drawn["x"], line, strict=True)
    }
    assert cells == {name: error for name, error in errors.items() if ".layers." in name}
    assert len(cells) == 14
    assert f"model.embed_tokens {errors['model.embed_tokens']:.3f}" in parse(written).text


def test_spectra_are_those_of_the_folded_matrices(written, models):
    import torch

    drawn = {
        trace["text"]: trace["y"] for trace in parse(written).figures["spectra-1"]["data"] if "mlp" in trace["name"]
    }
    name = "model.layers.1.mlp.down_proj"
    values = torch.linalg.svdvals(tensorfold.load(models.folded).get_submodule(name).to_dense(torch.float64))
    rank = len(drawn[name])
    assert rank == tensorfold.load(models.folded).get_submodule(name).spec.ranks[0]
    assert drawn[name] == pytest.approx((values[:rank] / values[0]).tolist(), rel=1e-3)


def test_bonds_are_listed_for_every_folded_matrix(written, models):
    text = parse(written).text
    modules = json.loads((models.folded / CARD).read_text())["modules"]
    for name in ("model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj", "model.embed_tokens"):
        assert ", ".join(map(str, modules[name]["ranks"])) in text
    assert "folded: 15 folded matrices" in text
    assert "0–1" in text


def test_the_front_joins_what_nothing_else_beats(copy, tmp_path):
    paths = [copy(name) for name in ("dense", "folded", "healed")]
    for path, parameters, perplexity in zip(paths, (100, 50, 60), (10.0, 20.0, 30.0), strict=True):
        line = {"protocol": "krony", "text": "t", "tokens": 5, "perplexity": perplexity, "parameters": parameters}
        (path / EVALUATIONS).write_text(json.dumps(line))
    page = report(paths, tmp_path / "r.html")
    front, *points = page.figures["pareto-0"]["data"]
    assert (front["name"], front["x"], front["y"]) == ("Pareto front", [50e-6, 100e-6], [20.0, 10.0])
    assert [(point["name"], point["x"], point["y"]) for point in points] == [
        ("dense", [100e-6], [10.0]), ("folded", [50e-6], [20.0]), ("healed", [60e-6], [30.0]),
    ]  # fmt: skip
    assert "not all of it was measured on as many parameters as there are now" in page.text


def test_losses_are_those_of_the_log(written, models):
    drawn = {trace["name"]: trace for trace in parse(written).figures["losses"]["data"]}
    log = [json.loads(line) for line in (models.healed / HEAL_LOG).read_text().splitlines()]
    steps = [record for record in log if "loss" in record and "stage" not in record]
    assert len(steps) == 3
    assert drawn["healed, training"]["y"] == [record["loss"] for record in steps]
    assert len(drawn["healed, validation"]["y"]) >= 2
    assert len(parse(written).figures["blocks-2"]["data"]) == 2
    healed = json.loads((models.healed / CARD).read_text())["heal"]
    assert f"{healed['validation_loss_before']:.4f} {healed['validation_loss']:.4f}" in parse(written).text


def test_samples_are_the_greedy_ones_of_each_model(written, models, tokenizer, command):
    text = parse(written).text
    assert f"Greedy text after the prompt {PROMPT}" in text
    for path in models.all:
        options = ("--prompt", PROMPT, "--tokens", "8", "--temperature", "0", "--json")
        made = json.loads(command("sample", path, *options).out)
        assert " ".join(made["text"].split()) in text


def test_nothing_is_loaded_from_anywhere_and_no_other_script_may_run(written):
    page = parse(written)
    assert not page.attributes("src")
    assert page.attributes("href") == ["data:,"]
    assert "url(" not in written.read_text(encoding="utf-8").partition("</style>")[0]
    policy = next(values["content"] for _, values in page.elements if values.get("http-equiv"))
    assert policy.startswith("default-src 'none';")
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts[1:]]
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes
    assert len(hashes) == 2
    assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]


def hostile(folded):
    """Everything that a directory's files may hold, as an attack on the page."""
    card = json.loads((folded / CARD).read_text())
    card.update(base_model=HOSTILE, recipe=HOSTILE, calibration=HOSTILE, heal={"text": HOSTILE, "steps": HOSTILE})
    for module in card["modules"].values():
        module["metric"] = HOSTILE
    (folded / CARD).write_text(json.dumps(card))
    line = {"protocol": HOSTILE, "text": HOSTILE, "device": HOSTILE, "perplexity": 2, "tokens": 3, "parameters": 4}
    (folded / EVALUATIONS).write_text(json.dumps(line))
    (folded / BENCH).write_text(json.dumps({HOSTILE: {"ratio": HOSTILE}}))
    (folded / HEAL_LOG).write_text(json.dumps({"step": HOSTILE, "loss": HOSTILE}) + "\n" + '{"step": 1, "loss": NaN}\n')
    other = folded.with_name("b<img src=x onerror=pwned()>")
    shutil.copytree(folded, other)
    return [folded, other]


def test_what_files_say_stays_text(copy, written, tmp_path):
    page = report(hostile(copy("folded")), tmp_path / "r.html")
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in parse(written).elements} | {
        "td",
        "tr",
        "th",
        "li",
        "ul",
    }
    assert len(page.scripts) == 3
    assert HOSTILE in "".join(page.words)
    assert "<" not in page.scripts[0]
    labels = json.dumps(page.figures)
    assert "&lt;img src=x onerror=pwned()&gt;" in labels
    assert "<img" not in labels
    assert not {name for _, values in page.elements for name in values if name.startswith("on")}


@pytest.mark.parametrize(
    ("file", "content", "note"),
    [
        (CARD, "{", "tensorfold.json is not valid JSON; left out."),
        (CARD, "[1]", "tensorfold.json holds no JSON object; left out."),
        (CARD, "{}", "tensorfold.json lists no modules"),
        (EVALUATIONS, '{"perplexity": 1}\nnot json\n', f"{EVALUATIONS}: 2 lines are no evaluations"),
        (HEAL_LOG, "[]\n", "heal.jsonl: 1 lines are no JSON objects"),
        (BENCH, "speed", "tensorfold-bench.json is not valid JSON; left out."),
        (CARD, json.dumps({"modules": 3, "heal": 4, "parameters_before": "many", "recipe": 5}), "lists no modules"),
    ],
)
def test_files_that_cannot_be_read_cost_a_line_not_the_report(copy, tmp_path, file, content, note):
    folded = copy("folded")
    (folded / file).write_text(content)
    assert note in report([folded], tmp_path / "r.html").text


def test_a_directory_with_weights_alone_gets_a_line_for_everything_else(models, dense_directory, tmp_path):
    page = report([dense_directory], tmp_path / "r.html")
    assert page.figures == {}
    for line in (
        "No evaluation is recorded. tensorfold eval DIR --text TEXT --record adds one.",
        "Needs two directories with evaluations",
        "No directory notes errors of folded blocks",
        "None of the directories is folded.",
        "None of the directories was healed",
        "Left out with --no-samples.",
        "No timings: tensorfold bench DIR --json > DIR/tensorfold-bench.json adds them.",
    ):
        assert line in page.text
    assert "Notes" not in page.text


@pytest.mark.parametrize("name", ["ratio", "speedup"])
def test_timings_are_shown_with_ratios_first(copy, tmp_path, name):
    folded = copy("folded")
    (folded / BENCH).write_text(json.dumps({"device": "cpu", "decode": [{"seconds": 0.51234, name: 1.2345}]}))
    assert (
        f"decode › 0 › {name} 1.23 device cpu decode › 0 › seconds 0.51" in report([folded], tmp_path / "r.html").text
    )


def test_a_model_that_cannot_give_a_sample_costs_a_line(copy, tmp_path):
    dense = copy("dense")
    for file in dense.glob("token*"):
        file.unlink()
    assert "No sample: model 'dense' has no tokenizer" in report([dense], tmp_path / "r.html", prompt="x").text


def test_equal_directories_give_equal_pages(models, tmp_path):
    for name in ("a.html", "b.html"):
        write_report(models.all, tmp_path / name, prompt=PROMPT, tokens=4)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_the_command_writes_the_page_and_says_so(command, models, tmp_path):
    out = tmp_path / "deep" / "report.html"
    outcome = command("report", models.dense, models.folded, "--out", out, "--no-samples", "--json")
    assert outcome.status == 0, outcome.err
    result = json.loads(outcome.out)
    assert result == {"out": str(out), "models": [str(models.dense), str(models.folded)], "bytes": out.stat().st_size}
    assert os.listdir(out.parent) == ["report.html"]
    out.write_text("older")
    assert command("report", models.dense, "--out", out, "--prompt", PROMPT, "--tokens", "2").status == 0
    assert f"after the prompt {PROMPT}" in parse(out).text


def test_eval_records_what_the_report_shows(command, copy, text_file, tmp_path):
    folded = copy("folded")
    options = ("--text", text_file, "--protocol", "disjoint-32", "--max-tokens", "128", "--json")
    assert command("eval", folded, *options).status == 0
    assert len((folded / EVALUATIONS).read_text().splitlines()) == 1
    result = json.loads(command("eval", folded, *options, "--record").out)
    text = report([folded], tmp_path / "r.html").text
    assert "disjoint-32, prose.txt, 124 predicted tokens" in text
    assert f"{result['perplexity']:,.2f} {result['accuracy']:.1%}" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["absent"], ["absent", "no such directory"]),
        (["file"], ["file", "is a file"]),
        (["empty"], ["empty", "no config.json"]),
        (["bare"], ["bare", "no .safetensors"]),
        (["cut"], ["cut", "its weights cannot be read"]),
        (["other"], ["other", "lacks the tensor", "cores.0"]),
        (["folded", "./folded"], ["folded", "twice"]),
        (["folded", "--prompt", "x", "--no-samples"], ["--prompt has no effect", "leave out --no-samples"]),
        (["folded", "--out", "empty"], ["empty", "is a directory"]),
        (["folded", "--out", "file/r.html"], ["cannot be"]),
        ([], ["DIR"]),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(refused, models, dense_directory, workplace, arguments, says):
    (workplace / "empty").mkdir()
    (workplace / "file").write_text("")
    for name in ("folded", "bare", "cut", "other"):
        shutil.copytree(models.folded, workplace / name)
    (workplace / "bare" / "model.safetensors").unlink()
    with (workplace / "cut" / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    shutil.copy(dense_directory / "model.safetensors", workplace / "other")
    before = sorted(os.listdir(workplace))
    refused("report", *arguments, *(() if "--out" in arguments else ("--out", "r.html")), says=says)
    assert sorted(os.listdir(workplace)) == before


def test_what_is_in_int8_is_shown_as_what_it_was_made_from(models, tokenizer, tmp_path):
    """Spectra to the rounding of eight bits."""
    path = tmp_path / "int8"
    export_int8(tensorfold.load(models.folded), path, tokenizer)
    page = report([models.folded, path], tmp_path / "r.html")
    before, after = (page.figures[f"spectra-{k}"]["data"] for k in range(2))
    assert [trace["text"] for trace in after] == [trace["text"] for trace in before]
    for old, new in zip(before, after, strict=True):
        assert new["y"] == pytest.approx(old["y"], abs=0.02)
    shutil.copy(models.folded / "model.safetensors", path)
    with pytest.raises(InputError, match=r"lacks the tensor .*others"):
        report([path], tmp_path / "r.html")


def test_a_missing_package_is_named(models, monkeypatch, tmp_path):
    monkeypatch.setattr(page, "PACKAGES", ("jinja2", "no_such_package"))
    with pytest.raises(InputError, match="pip install no_such_package"):
        write_report(models.all, tmp_path / "r.html")


@pytest.fixture
def browse(tmp_path):
    """``browse(page, width, dark)``: see :func:`browser.look`."""
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH; on Debian: apt-get install chromium")
    return lambda page, width, dark: look(page, width, dark, tmp_path)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(browse, written, width, dark):
    seen, console = browse(written, width, dark)
    assert console == []
    assert (seen["width"], seen["dark"]) == (width, dark)
    assert seen["scroll"] <= width
    assert seen["drawn"] == seen["charts"] == len(parse(written).figures) == 7
    assert seen["outside"] == 0
    assert seen["hidden"] == 1
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (seen["ink"], *seen["labels"])]
    assert len(brightness) == 2
    assert all((each > 500) == dark for each in brightness)


def test_in_a_browser_nothing_hostile_runs(browse, copy, tmp_path):
    report(hostile(copy("folded")), tmp_path / "hostile.html")
    seen, console = browse(tmp_path / "hostile.html", 390, False)
    # The page's policy would stop injected code and say so: an empty console means that there was none.
    assert console == []
    assert seen["images"] == 0
    assert seen["drawn"] == seen["charts"] > 0
    assert seen["scroll"] <= 390


def test_a_search_shows_where_the_budget_went(tiny, tokenizer, prose, tmp_path):
    model = tiny("llama")
    report = tensorfold.fold(model, Auto(keep=0.5), tokenizer, [prose], calibration_tokens=256)
    save(model, tokenizer, tmp_path / "auto", report.to_dict())
    write_report([tmp_path / "auto"], tmp_path / "report.html", prompt=None)
    drawn = parse(tmp_path / "report.html").figures["choices-0"]["data"]
    lines = {trace["text"]: trace for trace in drawn if trace["mode"] == "lines"}
    marks = {trace["text"]: trace for trace in drawn if trace["mode"] == "markers"}
    assert lines.keys() == marks.keys() == report.choices.keys()
    for name, choice in report.choices.items():
        assert lines[name]["x"] == [size for size, _ in choice.curve]
        assert marks[name]["x"] == [choice.parameters]
    card = tmp_path / "auto" / CARD
    card.write_text(json.dumps({"choices": {"a": 1, "b": {"parameters": "x", "curve": 3}, HOSTILE: {"curve": [[]]}}}))
    write_report([tmp_path / "auto"], tmp_path / "broken.html", prompt=None)
    assert "choices-0" not in parse(tmp_path / "broken.html").figures
