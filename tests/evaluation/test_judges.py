"""The text and protocol of an evaluation: a recipe's ``eval`` section, and the forms of wikitext."""

import json

import pytest

from tensorfold.data.text_forms import form_of
from tensorfold.data.texts import describe, in_form, load_text
from tensorfold.errors import InputError
from tensorfold.evaluation.protocols import form_needed

RAW = " = Title = \n\n A well @-@ known word .\n"
NON_RAW = " = Title = \n\n A well @-@ known <unk> .\n"


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Put files into TENSORFOLD_DATA."""

    def put(**files):
        folder = tmp_path / "data"
        folder.mkdir()
        for name, text in files.items():
            (folder / f"{name.replace('_', '-')}.txt").write_text(text)
        monkeypatch.setenv("TENSORFOLD_DATA", str(folder))

    return put


def test_the_form_is_read_off_the_text():
    assert (form_of([RAW]), form_of([NON_RAW]), form_of(["A well-known <unk>."])) == ("raw", "non-raw", None)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("wikitext-2", NON_RAW),
        ("wikitext-2-test", NON_RAW),
        ("wikitext-2-v1", NON_RAW),
        ("wikitext-2-v1-test", NON_RAW),
        ("wikitext-103", NON_RAW),  # has the validation and test texts of wikitext-2
        ("wikitext-103-v1", NON_RAW),
    ],
)
def test_names_of_the_hub_are_found_in_a_file_of_the_plain_name(data, name, found):
    data(wikitext_2_test=NON_RAW)
    assert load_text(name) == [found]
    assert "wikitext-2-test" in describe(name)


@pytest.mark.parametrize("name", ["wikitext-2-raw-v1", "wikitext-103-raw-v1"])
def test_a_file_of_the_other_form_is_not_taken_for_the_one_named(data, name):
    data(wikitext_2_test=NON_RAW)
    assert "wikitext-2-test.txt" not in describe(name)  # found on the hub instead
    assert "raw-v1" in describe(name)


def test_a_raw_file_serves_the_raw_name(data):
    data(wikitext_2_test=RAW)
    assert load_text("wikitext-2-raw-v1") == [RAW]
    assert "hub" not in describe("wikitext-103-raw-v1")


def test_training_texts_of_the_two_sizes_are_not_the_same(data):
    data(wikitext_2_train=NON_RAW)
    assert "wikitext-2" not in describe("wikitext-103-v1", "train")


def test_files_under_the_names_of_the_hub_serve_the_plain_name(data):
    data(wikitext_2_v1_test=NON_RAW, wikitext_2_raw_v1_test=RAW)
    assert load_text("wikitext-2") == [RAW]
    assert load_text("wikitext-2-v1") == [NON_RAW]


def test_a_protocol_gets_the_form_that_it_needs(data):
    data(wikitext_2_v1_test=NON_RAW, wikitext_2_raw_v1_test=RAW)
    assert load_text(in_form("wikitext-2", form_needed("krony"))) == [NON_RAW]
    assert load_text(in_form("wikitext-2", form_needed("hf-1024"))) == [RAW]
    assert load_text(in_form("wikitext-2-raw-v1", form_needed("krony"))) == [RAW]  # the name asks for this form


def test_the_form_that_is_there_is_taken_where_the_right_one_is_not(data):
    data(wikitext_2_test=RAW)
    assert load_text(in_form("wikitext-2", form_needed("krony"))) == [RAW]


def test_paths_are_never_renamed(tmp_path, monkeypatch):
    (tmp_path / "wikitext-2").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert in_form("wikitext-2", "non-raw") == "wikitext-2"


@pytest.fixture
def recipe(tmp_path, text_file, dense_directory):
    def write(section="eval: {{text: {text}, protocol: disjoint-32, max_tokens: 200}}"):
        path = tmp_path / "recipe.yaml"
        fold = "fold: [{targets: mlp, method: low-rank, keep: 0.5}]"
        path.write_text(f"model: {dense_directory}\n{fold}\n{section.format(text=text_file)}\n")
        return path

    return write


def test_eval_judges_by_the_recipe(command, folded_directory, recipe, text_file):
    found = json.loads(command("eval", folded_directory, "--recipe", recipe(), "--json").out)
    wanted = command(
        "eval", folded_directory, "--text", text_file, "--protocol", "disjoint-32", "--max-tokens", "200", "--json"
    )
    assert {**found, "seconds": 0} == {**json.loads(wanted.out), "seconds": 0}
    assert found["tokens"] < 200


def test_options_win_over_the_recipe_and_its_model_is_the_default(command, recipe):
    found = json.loads(command("eval", "--recipe", recipe(), "--protocol", "disjoint-16", "--json").out)
    assert (found["protocol"], found["window"], found["form"]) == ("disjoint-16", 16, None)


def test_a_recipe_without_the_section_is_an_error_that_says_so(refused, folded_directory, recipe):
    refused("eval", folded_directory, "--recipe", recipe(""), says=["no section 'eval'", "--text"])
    refused("eval", "--text", "python-docs", says=["no MODEL given"])


def test_a_result_says_which_form_of_wikitext_it_is_of(command, folded_directory, data):
    data(wikitext_2_test=RAW * 40)
    given = ("eval", folded_directory, "--text", "wikitext-2", "--protocol", "disjoint-32")
    assert json.loads(command(*given, "--json").out)["form"] == "raw"
    assert "wikitext-2-test, raw" in command(*given).out


def test_a_fold_names_the_command_that_judges_it(command, recipe, tmp_path):
    path = recipe()
    outcome = command("fold", "--recipe", path, "--out", tmp_path / "out")
    assert f"tensorfold eval {tmp_path / 'out'} --recipe {path}" in outcome.err


def test_a_text_that_is_nowhere_is_still_an_error(data):
    data(other=RAW)
    with pytest.raises(InputError, match="no text"):
        load_text("wikitext-2-v2")
