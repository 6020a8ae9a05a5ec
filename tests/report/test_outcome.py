"""The top of the report of ``compress``: three numbers, the verdict, a picture with the dense model in fewer bits."""

import copy

import pytest

pytest.importorskip("plotly")
pytest.importorskip("jinja2")

from browser import CHROMIUM, Page, look
from tensorfold.report.facts import read_directory
from tensorfold.report.outcome import headline, loading, outcome_rows
from tensorfold.report.page import render, write_report

ROW = {
    "own": 10.0, "unseen": 12.0, "prompt": 500.0, "decode": 20.0, "ours": False, "protocol": "hf-1024", "seen": False,
    "parameters": 10**8,
}  # fmt: skip
OURS = {"parameters": 8 * 10**7, "unseen": 15.0, "prompt": 650.0, "decode": None, "ours": True}
OUTCOME = {
    "order": {"engine": "onnx", "plain": False},
    "aim": {"bits": 8},
    "rows": [
        {**ROW, "name": "dense", "path": "m", "bytes": 400_000_000},
        {**ROW, "name": "dense, 8 bits", "path": "out/dense-8", "bytes": 100_000_000},
        {**ROW, "name": "dense, 4 bits", "path": "out/dense-4", "bytes": 60_000_000, "unseen": 13.0},
        {**ROW, "name": "folded, 8 bits", "path": "out/<b>", "bytes": 80_000_000, **OURS},
    ],
    "texts": {"own": "self (held out)", "unseen": "python-docs (unseen)"},
    "pays": False,
    "verdict": "Folding does not pay at this size: dense, 4 bits.",
}


def test_the_headline_is_beside_the_dense_model_in_the_same_bits():
    assert headline(OUTCOME) == [
        ("80.0 MB", "of weights", "0.80 of dense, 8 bits"),
        ("15.00", "perplexity on python-docs (unseen)", "1.25 times the dense model's"),
        ("650", "prompt tokens a second", "1.30 times dense, 8 bits"),
    ]


def test_rows_have_ratios_to_the_dense_model():
    last = outcome_rows(OUTCOME)[-1]
    assert last["MB"] == "80.0 (0.20×)"
    assert last["perplexity, python-docs (unseen)"] == "15.00 (1.25×)"
    assert last["decoded tokens/s"] == "–"


@pytest.mark.parametrize(
    ("engine", "plain", "bits", "says"),
    [
        ("onnx", False, 8, "tensorfold sample out/<b>"),
        ("transformers", True, 32, "from transformers import"),
        ("transformers", False, 32, "tensorfold.load"),
        ("transformers", True, 8, "tensorfold.load"),
    ],
)
def test_how_to_load_it(engine, plain, bits, says):
    outcome = copy.deepcopy(OUTCOME)
    outcome["order"], outcome["aim"] = {"engine": engine, "plain": plain}, {"bits": bits}
    assert says in loading(outcome)


def test_it_comes_first_and_is_escaped(folded_directory):
    models = [read_directory(folded_directory, "folded")]
    html = render(models, None, [], OUTCOME)
    page = Page(html)
    assert page.text.index("What you get") < page.text.index("Sizes")
    assert "Folding does not pay at this size" in page.text
    assert "pointless" in page.attributes("class")
    assert "out/<b>" in page.text
    assert ("b", {}) not in page.elements
    names = [trace["name"] for trace in page.figures["outcome-sizes"]["data"]]
    assert names == ["dense", "dense, 8 bits", "dense, 4 bits", "folded, 8 bits"]
    assert "What you get" not in render(models, None, [])


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_in_a_browser(folded_directory, tmp_path, width, dark):
    write_report([folded_directory], tmp_path / "report.html", prompt=None, outcome=OUTCOME)
    found, console = look(tmp_path / "report.html", width, dark, tmp_path)
    assert not console
    assert found["scroll"] <= found["width"] == width
    assert found["dark"] is dark
    assert found["drawn"] == found["charts"] >= 3
    assert found["outside"] == 0
