"""Suites: several texts and tasks of one model in one table, with what cannot be run left out and said so."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

import tensorfold
from tensorfold.errors import InputError
from tensorfold.evaluation import suites
from tensorfold.evaluation.protocols import get_protocol
from tensorfold.evaluation.suites import SUITES, TASKS, Suite, evaluate_suite
from tensorfold.utils.records import EVALUATIONS

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'tensorfold[lm-eval]'"
)
needs_tasks = pytest.mark.skipif(
    not Path(os.environ.get("TENSORFOLD_DATA", ""), "tasks").is_dir(), reason="needs the tasks of TENSORFOLD_DATA"
)


@pytest.fixture
def small(monkeypatch, workplace, prose):
    """A suite of one text that is there and one that is not."""
    (workplace / "text.txt").write_text(prose, encoding="utf-8")
    suite = Suite({"text.txt": "disjoint-32", "absent.txt": "disjoint-32"}, 200, {})
    monkeypatch.setattr(suites, "SUITES", {"small": suite})
    return suite


def test_the_shipped_suites_name_known_protocols_and_tasks():
    for suite in SUITES.values():
        for protocol in suite.texts.values():
            get_protocol(protocol)
        assert {f"{path.stem}_local" for path in TASKS.glob("*.yaml")} == set(suite.tasks)


def test_a_suite_is_what_eval_says_of_each_text(command, small, dense_directory):
    outcome = command("eval", dense_directory, "--suite", "small", "--json")
    assert outcome.status == 0, outcome.err
    found = json.loads(outcome.out)
    alone = command(
        "eval", dense_directory, "--text", "text.txt", "--protocol", "disjoint-32", "--max-tokens", "200", "--json"
    )
    [row], expected = found["rows"], json.loads(alone.out)
    assert {**row, "seconds": 0} == {**expected, "seconds": 0}
    assert list(found["skipped"]) == ["absent.txt"]
    assert (found["suite"], found["parameters"], found["bytes"]) == ("small", row["parameters"], row["bytes"])
    table = command("eval", dense_directory, "--suite", "small").out
    assert f"perplexity {row['perplexity']:,.2f} [" in table
    assert "not run: absent.txt: " in table


def test_a_suite_records_every_row(command, small, dense_directory, tmp_path):
    command("fold", dense_directory, "--keep", "0.5", "--calibrate", "none", "--out", tmp_path / "f")
    assert command("eval", tmp_path / "f", "--suite", "small", "--record").status == 0
    [line] = (tmp_path / "f" / EVALUATIONS).read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["text"] == "text.txt"


def test_a_suite_of_which_nothing_can_be_run_is_refused(refused, monkeypatch, workplace, dense_directory):
    monkeypatch.setattr(suites, "SUITES", {"small": Suite({"absent.txt": "hf-1024"}, 200, {})})
    refused("eval", dense_directory, "--suite", "small", says=["suite small: nothing of it can be run", "absent.txt"])


def test_what_tasks_lack_is_said(monkeypatch, tiny, tokenizer, tmp_path, small):
    monkeypatch.setenv("TENSORFOLD_DATA", str(tmp_path))
    with pytest.raises(InputError, match=r"before its export"):
        suites._task(object(), tokenizer, "piqa_local", 3)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'tensorfold\[lm-eval\]'"):
        suites._task(tiny("llama"), tokenizer, "piqa_local", 3)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(InputError, match=r"needed .*piqa.jsonl"):
        suites._task(tiny("llama"), tokenizer, "piqa_local", 3)


@needs_harness
@needs_tasks
def test_tasks_are_rows_with_their_standard_errors(monkeypatch, folded_directory, tokenizer, prose, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(prose, encoding="utf-8")
    tasks = {"blimp_local": 4}  # the others' choices have more tokens than the tiny model has positions
    monkeypatch.setattr(suites, "SUITES", {"small": Suite({"text.txt": "disjoint-32"}, 200, tasks)})
    seen = []
    result = evaluate_suite(tensorfold.load(folded_directory), tokenizer, "small", progress=seen.append)
    assert seen == ["text.txt", *tasks]
    assert not result.skipped
    for row, (task, limit) in zip(result.rows[1:], tasks.items(), strict=True):
        assert row.text == f"{task} (first {limit} documents)"
        assert 0 <= row.results[task]["acc"] <= 1
    assert str(result).count("acc ") == 1
