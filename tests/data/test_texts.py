"""Every way of naming a text, with files that the test writes and a stand-in for ``datasets``."""

import json
import sys
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import pytest

from tensorfold.data.hub import HUB_DATASETS
from tensorfold.data.texts import describe, load_text
from tensorfold.errors import InputError


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """An empty working directory, no data directory, and no ``datasets`` to fall back on."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.delenv("TENSORFOLD_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    root = tmp_path / "data"
    root.mkdir()
    monkeypatch.setenv("TENSORFOLD_DATA", str(root))
    return root


def write_jsonl(path: Path, *documents: str) -> None:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")


def fake_hub(monkeypatch, load_dataset) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


def test_a_file_is_one_document_verbatim(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("  é\r\n\r\nx \u2028 y\n".encode())
    assert load_text(str(path)) == ["  é\r\n\r\nx \u2028 y\n"]
    assert describe(str(path)) == "a.txt"


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfword")
    assert load_text(str(tmp_path / "a.txt")) == ["word"]


def test_jsonl_has_a_document_a_line_and_keeps_unescaped_line_separators(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\u2028two", "id": 1}\n\n{"text": "three"}', encoding="utf-8")
    assert load_text(str(path)) == ["one\u2028two", "three"]


def test_a_directory_is_read_in_sorted_order_without_hidden_files(tmp_path):
    root = tmp_path / "texts"
    (root / "b").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / "c.txt").write_text("c")
    write_jsonl(root / "b" / "x.jsonl", "b1", "b2")
    (root / "a.txt").write_text("a")
    (root / "b" / ".hidden.txt").write_text("no")
    (root / ".git" / "config").write_text("no")
    assert load_text(str(root)) == ["a", "b1", "b2", "c"]
    assert describe(str(root)) == "texts/"


def test_short_documents_are_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, "   ", "ab", " abc ", "")
    assert load_text(str(path)) == ["ab", " abc "]
    assert load_text(str(path), min_characters=3) == [" abc "]
    with pytest.raises(InputError, match=r"empty.*at least 9 characters"):
        load_text(str(path), min_characters=9)


@pytest.mark.parametrize("content", ["", " \n"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_an_empty_file_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=rf"{name}.*empty"):
        load_text(str(tmp_path / name))


def test_an_empty_directory_is_refused(tmp_path):
    (tmp_path / "texts").mkdir()
    with pytest.raises(InputError, match=r"texts/.*empty"):
        load_text(str(tmp_path / "texts"))


def test_bytes_that_are_not_utf8_are_named_by_offset(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 noir")
    with pytest.raises(InputError, match=r"latin\.txt is not UTF-8: byte 0xe9 at offset 3"):
        load_text(str(tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{text: 1}", "line 2: not JSON"),
        ('"text"', "line 2: got a JSON str"),
        ('{"body": "x", "id": 3}', r"line 2: got an object with the keys \['body', 'id'\]"),
        ('{"text": null}', 'line 2: got .*needed an object with a string "text"'),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        load_text(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("stem", ["wikitext-2-valid", "wikitext-2-validation", "wikitext-2-val"])
@pytest.mark.parametrize(
    ("source", "split"),
    [
        ("wikitext-2", "validation"),
        ("wikitext-2", "valid"),
        ("wikitext-2-valid", "test"),
        ("wikitext-2-validation", "test"),
    ],
)
def test_a_named_split_is_found_under_every_spelling(data, stem, source, split):
    (data / f"{stem}.txt").write_text("validation text")
    (data / "wikitext-2-test.txt").write_text("test text")
    assert load_text(source, split=split) == ["validation text"]
    assert describe(source, split) == "wikitext-2-validation"


def test_test_is_the_default_split(data):
    write_jsonl(data / "lambada-test.jsonl", "one", "two")
    (data / "lambada-train.txt").write_text("train text")
    assert load_text("lambada") == load_text("lambada-test", split="train") == ["one", "two"]
    assert describe("lambada") == "lambada-test"


def test_a_name_without_a_split_is_found_as_file_or_directory(data):
    (data / "tinyshakespeare.txt").write_text("First Citizen:")
    (data / "train").mkdir()
    (data / "train" / "abc.txt").write_text("abc")
    assert load_text("tinyshakespeare", split="train") == ["First Citizen:"]
    assert load_text("train") == ["abc"]
    assert (describe("tinyshakespeare"), describe("train")) == ("tinyshakespeare", "train")


def test_jsonl_wins_over_txt_and_any_suffix_will_do(data):
    (data / "news-test.txt").write_text("txt")
    (data / "news-test.text").write_text("text")
    write_jsonl(data / "news-test.jsonl", "jsonl")
    (data / "other-test.md").write_text("md")
    assert load_text("news") == ["jsonl"]
    assert load_text("other") == ["md"]


def test_a_path_on_disk_wins_over_the_data_directory(data):
    (data / "wikitext-2.txt").write_text("data directory")
    Path("wikitext-2").write_text("working directory")
    assert load_text("wikitext-2") == ["working directory"]


def test_the_data_directory_wins_over_the_hub(data, monkeypatch):
    fake_hub(monkeypatch, lambda *args, **options: pytest.fail("asked the hub"))
    (data / "openwebtext-test.txt").write_text("local")
    assert load_text("openwebtext") == ["local"]


def test_a_data_directory_that_is_none_is_refused(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for value, message in [
        ("", "not a directory"),
        (str(tmp_path / "none"), "not a directory"),
        (str(tmp_path / "file"), "not a directory"),
        (str(tmp_path / "empty"), "empty directory"),
    ]:
        monkeypatch.setenv("TENSORFOLD_DATA", value)
        with pytest.raises(InputError, match=f"TENSORFOLD_DATA=.*{message}"):
            load_text("wikitext-2")
        assert load_text(str(tmp_path / "file")) == ["x"], "a path does not need the variable"


def test_python_docs_are_two_halves_cut_between_paragraphs():
    (first,) = load_text("python-docs", split="calibration")
    (last,) = load_text("python-docs")
    assert first + last == "\n\n".join(text for _, text in sorted(topics.items()))
    assert first.endswith("\n\n")
    assert abs(len(first) - len(last)) < 0.05 * len(last)
    assert load_text("python-docs", split="train") == load_text("python-docs-validation") == [first]
    assert load_text("python-docs-test", split="train") == [last]
    assert describe("python-docs") == describe("python-docs-test", "train") == "python-docs (test)"
    assert describe("python-docs", "train") == "python-docs (calibration)"


@pytest.mark.parametrize(
    ("source", "near"),
    [("wikitext2", "wikitext-2"), ("python-doc", "python-docs"), ("tinyshakespear", "tinyshakespeare")],
)
def test_an_unknown_name_is_answered_with_near_ones(data, source, near):
    (data / "tinyshakespeare.txt").write_text("x")
    with pytest.raises(InputError, match=rf"no text '{source}'.*did you mean .*{near}"):
        load_text(source)


def test_a_mistyped_path_is_answered_with_its_neighbours(tmp_path):
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(InputError, match=r"did you mean .*corpus\.txt"):
        load_text(str(tmp_path / "corpsu.txt"))


def test_an_unknown_name_unlike_any_other_lists_them():
    with pytest.raises(InputError, match=r"no text 'q'.*c4.*openwebtext"):
        load_text("q")


@pytest.mark.parametrize("source", ["x" * 5000, "a\0b", "no/such/file.txt", "-test"])
def test_odd_names_are_refused_in_one_line(source):
    with pytest.raises(InputError, match="no text") as error:
        load_text(source)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("source", ["", " ", None])
def test_no_name_is_refused(source):
    with pytest.raises(InputError, match="must be a file"):
        load_text(source)


def test_an_unknown_split_is_refused():
    with pytest.raises(InputError, match=r"unknown split 'tset'.*validation"):
        load_text("wikitext-2", split="tset")


def test_wikitext_rows_from_the_hub_are_joined_as_lines(monkeypatch):
    calls = []

    def load_dataset(path, config, *, split, streaming):
        calls.append((path, config, split, streaming))
        return [{"text": row} for row in ("", " = Title = \n", "", "Words . \n")]

    fake_hub(monkeypatch, load_dataset)
    assert load_text("wikitext-2", split="valid") == ["\n\n = Title = \n\n\n\n\nWords . \n"]
    assert calls == [("Salesforce/wikitext", "wikitext-2-raw-v1", "validation", False)]
    assert describe("wikitext-2") == "wikitext-2-test (Salesforce/wikitext, wikitext-2-raw-v1)"


def test_documents_of_a_huge_data_set_are_streamed(monkeypatch):
    def load_dataset(path, config, *, split, streaming):
        assert streaming
        assert split == "train"
        while True:
            yield {"text": "document"}

    fake_hub(monkeypatch, load_dataset)
    assert len(load_text("openwebtext-train")) == HUB_DATASETS["openwebtext"].first
    assert f"first {HUB_DATASETS['openwebtext'].first} documents" in describe("openwebtext", "train")


def test_a_hub_that_cannot_be_reached_says_what_to_do(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("no route\nto host")

    fake_hub(monkeypatch, load_dataset)
    message = (
        r"wikitext-103.*ConnectionError: no route; needed a network.*\$TENSORFOLD_DATA/wikitext-103-validation\.txt"
    )
    with pytest.raises(InputError, match=message):
        load_text("wikitext-103", split="valid")


def test_a_missing_datasets_package_says_what_to_install():
    with pytest.raises(InputError, match=r"pip install datasets.*\$TENSORFOLD_DATA/lambada-test\.txt"):
        load_text("lambada")


def test_a_split_the_hub_lacks_is_refused():
    with pytest.raises(InputError, match=r"lambada has no split 'train' on the hub, only test; give lambada-test"):
        load_text("lambada", split="train")
