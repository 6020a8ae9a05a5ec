"""Numbers in README, docs, studies and recipes are those of the logs; ``studies/check_numbers.py`` compares them."""

import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")  # the table scripts draw too

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))

import check_numbers
from check_numbers import TABLE_SCRIPTS, check_rest, check_sections, check_sentences, documents, formatted


@pytest.fixture
def altered(monkeypatch):
    """A document with one piece of its text replaced."""

    def alter(document, old, new):
        text = check_numbers.text_of(document)
        assert text.count(old) == 1
        monkeypatch.setattr(check_numbers, "text_of", lambda name: text.replace(old, new) if name == document else "")

    return alter


@pytest.mark.parametrize("document", documents())
def test_every_number_is_that_of_a_log_or_allowed(document):
    faults, bound = check_sentences(document)
    assert "\n".join(map(str, faults + check_rest(document, bound))) == ""


@pytest.mark.parametrize("script", TABLE_SCRIPTS, ids=lambda script: f"{script.parent.name}/{script.name}")
def test_tables_are_what_their_scripts_write(script):
    assert "\n".join(map(str, check_sections(script))) == ""


def test_every_sentence_belongs_to_a_document():
    assert check_numbers.figures()["documents"].keys() <= set(documents())


def test_nothing_is_allowed_that_is_not_there():
    for entry in check_numbers.figures()["allow"]:
        texts = [check_numbers.text_of(document) for document in check_numbers.meant(entry["in"])]
        for pattern in entry["text"]:
            assert any(re.search(pattern.replace(" ", r"\s+"), text) for text in texts), pattern


def test_a_wrong_number_is_named_with_its_line_and_the_logs_value(altered):
    altered("docs/measured.md", "182.11 → 59.66 → **29.19**", "182.11 → 59.66 → **29.91**")
    [fault], _ = check_sentences("docs/measured.md")
    lines = (check_numbers.ROOT / "docs/measured.md").read_text().splitlines()
    assert fault.number == "29.91"
    assert "182.11 → 59.66" in lines[fault.line - 1]
    assert "the log gives 29.19" in str(fault)


@pytest.mark.parametrize(
    "sentence",
    [
        "It takes 31 s.",
        "The perplexity is 24.71.",
        "It is 3 × smaller.",
        "It loses 7 %.",
        "106 ± 1",
        "1,203 lost",
    ],
)
def test_a_number_that_no_log_gives_is_a_fault(altered, sentence):
    altered("README.md", "## Licence", f"{sentence}\n\n## Licence")
    _, bound = check_sentences("README.md")
    faults = check_rest("README.md", bound)
    assert faults
    assert all(fault.number in sentence for fault in faults)


def test_a_sentence_that_is_gone_is_a_fault(altered):
    altered("docs/index.md", "a perplexity of 183,696", "a loss of 183,696")
    [fault], _ = check_sentences("docs/index.md")
    assert "found 0 times" in str(fault)


def test_a_table_that_somebody_edited_is_a_fault(altered):
    altered("studies/smollm2/README.md", "| 118,589,636 | 30.83 |", "| 118,589,636 | 30.38 |")
    [script] = [path for path in TABLE_SCRIPTS if path.parent.name == "smollm2" and path.name == "table.py"]
    [fault] = check_sections(script)
    assert "30.38" in fault.number
    assert "30.83" in fault.why


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [(0.3061, "..3f", ".306"), (5.1e-6, ".1e", "5.1e-6"), (118589636, ",", "118,589,636"), (52.594, ".2f", "52.59")],
)
def test_formats(value, form, text):
    assert formatted(value, form) == text
