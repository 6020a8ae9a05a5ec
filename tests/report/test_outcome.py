"""The top of the report of ``compress``: three numbers, the verdict, a picture with the dense model in fewer bits."""

import copy

import pytest

pytest.importorskip("plotly")
pytest.importorskip("jinja2")

from browser import CHROMIUM, Page, look
from tensorfold.report.facts import read_directory
from tensorfold.report.outcome import headline, loading, outcome_chart, outcome_rows, speed_bars
from tensorfold.report.page import render, write_report

ROW = {
    "own": 10.0, "unseen": 12.0, "prompt": 500.0, "decode": 20.0, "ours": False, "protocol": "hf-1024", "seen": 0.0,
    "parameters": 10**8,
}  # fmt: skip
OURS = {"parameters": 8 * 10**7, "unseen": 15.0, "prompt": 650.0, "decode": None, "ours": True}
OUTCOME = {
    "order": {"engine": "onnx", "plain": False, "model": "somewhere/m"},
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
    "prompt": "A tool",
    "samples": [
        {"label": "dense", "text": " is <b>good", "tokens": 3, "problem": ""},
        {"label": "folded, 8 bits", "text": "", "tokens": 0, "problem": "no room"},
    ],
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
    outcome["order"], outcome["aim"] = {"engine": engine, "plain": plain, "model": "m"}, {"bits": bits}
    assert says in loading(outcome)


def test_bars_are_as_long_as_speeds():
    (prompt, bars), (decode, generated) = speed_bars(OUTCOME)
    assert (prompt, decode) == ("Prompt", "Generated text")
    assert [(bar.value, bar.part, bar.ours) for bar in bars] == [("500", 0.7692, False)] * 3 + [("650", 1.0, True)]
    assert bars[-1].beside == "1.30× dense"
    assert len(generated) == 3  # the last was not measured


def test_the_result_stands_out_and_axes_have_round_numbers():
    figure = outcome_chart(OUTCOME).figure
    assert [trace["marker"]["symbol"] == "star" for trace in figure["data"]] == [False, False, False, True]
    for axis, values in (("xaxis", (60, 400)), ("yaxis", (12, 15))):
        low, high = (10**end for end in figure["layout"][axis]["range"])
        assert low < min(values) < max(values) < high
        assert 3 <= len(figure["layout"][axis]["tickvals"]) <= 7
        assert all(low <= each <= high for each in figure["layout"][axis]["tickvals"])


def test_it_tells_the_story_top_down_and_is_escaped(folded_directory, tmp_path):
    write_report([folded_directory], tmp_path / "report.html", prompt="not this one", outcome=OUTCOME)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    order = [
        "m with 80% of its parameters", "What you get", "Size against quality", "What was chosen for each matrix",
        "Samples, side by side", "A tool is <b>good", "No sample: no room", "Speed", "1.30× dense", "How to load it",
        "Everything else that is known", "Sizes",
    ]  # fmt: skip
    places = [page.text.index(each) for each in order]
    assert places == sorted(places)
    models = [read_directory(folded_directory, "folded")]
    assert "Folding does not pay at this size" in page.text
    assert "pointless" in page.attributes("class")
    assert "out/<b>" in page.text
    assert ("b", {}) not in page.elements
    names = [trace["name"] for trace in page.figures["outcome-sizes"]["data"]]
    assert names == ["dense", "dense, 8 bits", "dense, 4 bits", "folded, 8 bits (the result)"]
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
    assert found["maps"] == 1
    assert found["cells"] > 3
    assert found["said"] == found["reasons"] == 3  # by pointing, by tapping and by an arrow key
    assert found["contrast"] >= 4.5
