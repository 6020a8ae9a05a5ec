import json
import os
import sys
import types

import numpy as np
import pytest

from byte_tokenizer import Bytes
from tensorfold.data.documents import iter_documents
from tensorfold.data.texts import load_text
from tensorfold.data.token_cache import TokenCache
from tensorfold.errors import InputError, TensorfoldError

PROSE = "Two lines,\r\nof prose.\n\n"


@pytest.fixture
def corpus(tmp_path):
    """A directory with every kind of file that a text may have, and its documents."""
    root = tmp_path / "corpus"
    (root / "sub").mkdir(parents=True)
    (root / ".hidden.txt").write_text("not me")
    (root / "a.txt").write_bytes(("\ufeff" + PROSE * 20).encode())
    rows = ["first\u2028document", "  ", PROSE * 9, "last"]
    (root / "b.jsonl").write_bytes("\r\n".join(json.dumps({"text": row}, ensure_ascii=False) for row in rows).encode())
    (root / "sub" / "c.md").write_bytes((PROSE * 3 + "\r\n").encode())
    (root / "sub" / "empty.txt").write_text(" \n")
    return root


def test_documents_are_those_of_load_text(corpus, monkeypatch):
    for name in ("a.txt", "b.jsonl", "sub", ""):
        assert list(iter_documents(str(corpus / name))) == load_text(str(corpus / name))
    monkeypatch.setenv("TENSORFOLD_DATA", str(corpus.parent))
    (corpus.parent / "named-valid.jsonl").write_text(json.dumps({"text": "named"}))
    (corpus.parent / "plain.txt").write_text("plain")
    for source in ("named", "named-validation", "plain", "corpus", "python-docs"):
        assert list(iter_documents(source, "validation")) == load_text(source, split="validation")
    assert list(iter_documents("python-docs", "train")) == load_text("python-docs", split="train")
    assert list(iter_documents([corpus / "sub", str(corpus / "b.jsonl")])) == [
        *load_text(str(corpus / "sub")),
        *load_text(str(corpus / "b.jsonl")),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\n\xff\xfe", "not UTF-8: byte 0xff"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "broken\n', "line 2: not JSON"),
        (
            "a.jsonl",
            b'{"text": "fine"}\n\n{"content": "other"}\n',
            r"line 3: got an object with the keys \['content'\]",
        ),
        ("a.jsonl", b"[1]", "line 1: got a JSON list"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}.*{message}"):
        TokenCache.build(tmp_path / name, Bytes(), 8, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_unknown_and_missing_sources(tmp_path):
    with pytest.raises(InputError, match="no text 'nowhere'"):
        TokenCache.build("nowhere", Bytes(), 8, cache_dir=tmp_path)
    with pytest.raises(InputError, match="empty list of texts"):
        TokenCache.build([], Bytes(), 8, cache_dir=tmp_path)


class FakeHub:
    """A stand-in for the packages that talk to the hub; it records what they are asked."""

    def __init__(self, monkeypatch, rows):
        self.rows, self.revision, self.asked = rows, "c0ffee", []
        monkeypatch.delenv("TENSORFOLD_DATA", raising=False)
        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=self.load_dataset))
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: self)

    def dataset_info(self, repository):
        if self.revision is None:
            raise ConnectionError("no network")
        return types.SimpleNamespace(sha=self.revision)

    def load_dataset(self, path, config, *, split, streaming, revision):
        self.asked.append((path, config, split, streaming, revision))
        for row in self.rows:
            if row is None:
                raise ConnectionError("lost")
            yield {"text": row}


def test_hub_data_set_is_streamed_at_one_commit(tmp_path, monkeypatch):
    hub = FakeHub(monkeypatch, ["", " = Title = \n", "Line.\n"])
    assert list(iter_documents("wikitext-2", "valid")) == ["\n\n".join(hub.rows)]  # rows are lines of one text
    assert hub.asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "validation", True, "c0ffee")]
    cached = TokenCache.build("openwebtext", Bytes(), 8, cache_dir=tmp_path)
    assert cached.label == "openwebtext-train (Skylion007/openwebtext)"
    assert np.fromfile(cached.path / "tokens.bin", dtype="uint16").tolist() == [
        *hub.rows[1].encode(),
        256,
        *hub.rows[2].encode(),
        256,
    ]
    assert len(hub.asked) == 2
    assert TokenCache.build("openwebtext", Bytes(), 4, cache_dir=tmp_path).key == cached.key
    assert len(hub.asked) == 2

    hub.revision = None
    assert TokenCache.build("openwebtext", Bytes(), 8, cache_dir=tmp_path) == cached  # no network, known tokens
    hub.revision = "decaf"
    assert TokenCache.build("openwebtext", Bytes(), 8, cache_dir=tmp_path).key != cached.key


def test_hub_that_stops_answering(tmp_path, monkeypatch):
    FakeHub(monkeypatch, ["some text", None])
    with pytest.raises(TensorfoldError, match="could not be read to its end: ConnectionError: lost"):
        TokenCache.build("c4", Bytes(), 4, cache_dir=tmp_path)
    assert os.listdir(tmp_path) == []
