"""A sample of the campaign in ``studies/reliability``: damaged files, recipes, options and arguments, by seed.

Every one ends with one line on standard error and the Contract's exit status, or succeeds; nothing is left behind.
"""

import json
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("gguf")
pytest.importorskip("hypothesis")

CAMPAIGN = Path(__file__).parents[2] / "studies" / "reliability"
EACH = 40


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """The modules of the campaign, and its templates of arguments."""
    sys.path.insert(0, str(CAMPAIGN))
    try:
        import calls
        import inputs

        yield inputs, calls, inputs.make_templates(tmp_path_factory.mktemp("campaign") / "templates")
    finally:
        sys.path.remove(str(CAMPAIGN))


@pytest.fixture
def quiet(monkeypatch, capfd):
    """Set what the command line sets before its imports, since other tests may have imported already."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    monkeypatch.delenv("TENSORFOLD_DATA", raising=False)
    yield
    logging.set_verbosity(verbosity)


def test_the_log_has_every_case_and_none_that_went_wrong():
    lines = [json.loads(line) for line in (CAMPAIGN / "inputs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert "wrong" not in {line["verdict"] for line in lines}
    numbers = [number for line in lines for number in line.get("cases", ())]
    assert sorted(number for number in numbers if isinstance(number, int)) == list(range(2400))
    assert {number for number in numbers if isinstance(number, str)} == {f"tasks-{number}" for number in range(60)}
    assert sum(line.get("count", 0) for line in lines) == 812


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize("first", range(10_000, 10_000 + 4 * EACH, EACH))
def test_commands(campaign, quiet, capfd, tmp_path, monkeypatch, first):
    inputs, _, templates = campaign
    monkeypatch.chdir(tmp_path)
    wrong = []
    with capfd.disabled():
        for number in range(first, first + EACH):
            inputs.fresh(tmp_path)
            case = inputs.make_case(number, 0, templates)
            found = inputs.run_case(case, tmp_path, templates)
            if found["verdict"] in ("wrong", "failed") and "more than one line" not in found.get("wrong", []):
                wrong.append((number, case.arguments, found))
    assert not wrong


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_public_functions(campaign, quiet, capfd, tmp_path, monkeypatch):
    inputs, calls, templates = campaign
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    entries = []
    with capfd.disabled():
        calls.call_everything(200, templates, entries.append, inputs.timed, inputs.captured, tmp_path / "printed")
    assert len(entries) >= 200
    assert [entry for entry in entries if entry["verdict"] == "wrong"] == []
