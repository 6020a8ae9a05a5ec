"""A sample of the campaign of situations in ``studies/reliability``, and that its judges see what is wrong."""

import json
import sys
from pathlib import Path
from random import Random

import pytest
import torch

import tensorfold

CAMPAIGN = Path(__file__).parents[1] / "studies" / "reliability"


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """The campaign's module, and its templates."""
    sys.path.insert(0, str(CAMPAIGN))
    try:
        import situations

        yield situations, situations.make_templates(tmp_path_factory.mktemp("situations") / "templates")
    finally:
        sys.path.remove(str(CAMPAIGN))


@pytest.mark.parametrize("kind", ["dtypes", "unchanged"])
def test_situations(campaign, tmp_path, monkeypatch, kind):
    situations, templates = campaign
    monkeypatch.chdir(tmp_path)
    found = [situations.run_one(kind, number, tmp_path, templates) for number in range(4)]
    assert [entry for entry in found if entry["verdict"] == "wrong"] == []


def test_a_refusal_that_changes_something_is_wrong(campaign, tmp_path, monkeypatch):
    situations, templates = campaign

    def spoil(model, *_, **__):
        with torch.no_grad():
            next(model.parameters()).view(-1)[-1] += 1
        raise tensorfold.InputError("no")

    monkeypatch.setattr(tensorfold, "fold", spoil)
    monkeypatch.chdir(tmp_path)
    verdicts = [list(situations.unchanged(Random(number), templates)) for number in range(8)]
    assert all(verdict == "wrong" for what, (verdict, _) in verdicts if "fold," in what)
    assert any("fold," in what for what, _ in verdicts)


def test_what_is_in_the_log_is_not_run_again(campaign, tmp_path, monkeypatch):
    situations, _ = campaign
    log = tmp_path / "log.jsonl"
    monkeypatch.chdir(tmp_path)
    words = ["--cases", "1", "--kinds", "dtypes", "--scratch", str(tmp_path / "scratch"), "--log", str(log)]
    monkeypatch.setattr(sys, "argv", ["situations.py", *words])
    situations.main()
    [entry] = map(json.loads, log.read_text().splitlines())
    assert entry["case"] == "dtypes-0"
    before = log.read_bytes()
    monkeypatch.setattr(situations, "run_one", None)
    situations.main()
    assert log.read_bytes() == before
