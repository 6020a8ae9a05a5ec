"""Rows of a search in the report: what each layer was given, what that was to cost and did, and what else was there."""

import pytest

import tensorfold
from tensorfold.hf.loading import save
from tensorfold.report.facts import read_directory
from tensorfold.report.page import write_report
from tensorfold.report.tables import choice_rows


@pytest.fixture(scope="module")
def searched(tiny, tokenizer, prose, tmp_path_factory):
    """(report of the fold, directory) of a model with a budget for all its linear layers."""
    path = tmp_path_factory.mktemp("choices") / "auto"
    model = tiny("llama")
    recipe = tensorfold.Recipe.keep(0.6, "all-linear")
    report = tensorfold.fold(model, recipe, tokenizer, [prose], calibration_tokens=512)
    save(model, tokenizer, path, report.to_dict())
    return report, path


def test_every_layer_of_the_budget_has_a_row(searched):
    report, path = searched
    rows = {row["matrix"]: row for row in choice_rows(read_directory(path, "auto"))}
    assert rows.keys() == report.choices.keys()
    for name, choice in report.choices.items():
        row, curve = rows[name], dict(choice.curve)
        assert row["parameters"] == f"{choice.parameters:,}"
        assert row["predicted error"] == f"{curve[choice.parameters]:.3f}"
        assert row["given"] == ("dense" if choice.dense else str(report.modules[name]))
        assert row["measured"] == ("–" if choice.dense else f"{report.errors[name]:.3f}")
        less = max((size for size in curve if size < choice.parameters), default=None)
        assert row["with fewer"] == ("–" if less is None else f"{curve[less]:.3f} at {less:,}")
        best = min(choice.rivals, key=choice.rivals.get, default=None)
        assert row["others of this size"].startswith("–" if best is None else f"{best}: {choice.rivals[best]:.3f}")
    assert any(choice.rivals for choice in report.choices.values())


def test_the_page_shows_them(searched, tmp_path):
    report, path = searched
    write_report([path], tmp_path / "report.html", prompt=None)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"{len(report.choices)} layers that shared a budget" in page
    assert all(page.count(name) >= 2 for name in report.choices)


def test_rivals_that_are_no_numbers_are_left_out(searched, tmp_path):
    _, path = searched
    card = path / "tensorfold.json"
    text = card.read_text(encoding="utf-8")
    card.write_text(text.replace('"rivals": {', '"rivals": {"<b>": "x", "far": 1e9999, ', 1), encoding="utf-8")
    try:
        rows = choice_rows(read_directory(path, "auto"))
    finally:
        card.write_text(text, encoding="utf-8")
    assert not any("<b>" in row["others of this size"] or "far" in row["others of this size"] for row in rows)
