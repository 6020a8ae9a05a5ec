import json
import multiprocessing
import os
import pickle
import signal
import tracemalloc
from errno import ENOSPC

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from byte_tokenizer import Bytes, byte_pairs
from tensorfold.data import documents, encode
from tensorfold.data import token_cache as data
from tensorfold.data.documents import find_texts, iter_pieces
from tensorfold.data.texts import load_text
from tensorfold.data.token_cache import TokenCache
from tensorfold.errors import InputError, TensorfoldError

pytestmark = pytest.mark.forks

PROSE = "The quick brown fox, aged 12, isn't lazy.\n\n  It jumps\tover 3 dogs;\r\nthe cat's asleep - naïve café! "


def trained(vocabulary=400, eos="<eos>"):
    """A tokenizer of the GPT-2 family, trained on the test prose."""
    return byte_pairs([PROSE], vocabulary, [eos] if eos else [], eos_token=eos)


class Fatal(Bytes):
    """A tokenizer that kills its process at the second batch, as an out-of-memory killer would."""

    calls = 0

    def __call__(self, texts, **_):
        self.calls += 1
        if self.calls == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(texts)


@pytest.fixture(scope="module")
def tokenizer():
    return trained()


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(documents, "_CHUNK", 256)
    monkeypatch.setattr(documents, "_MARGIN", 64)
    monkeypatch.setattr(encode, "_BATCH", 1024)


@pytest.fixture
def corpus(tmp_path):
    """Two files: one with a long document, one with several documents of which one is blank."""
    root = tmp_path / "corpus"
    root.mkdir()
    (root / "a.txt").write_text(PROSE * 20)
    rows = ["first", "  ", PROSE * 9, "last"]
    (root / "b.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return root


def stream(cached):
    return np.fromfile(cached.path / "tokens.bin", dtype=cached.dtype)


def expected_ids(tokenizer, texts):
    return [token for text in texts for token in [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]]


def test_tokens_are_those_of_whole_documents(corpus, tmp_path, tokenizer, small_pieces):
    assert sum(1 for text in find_texts(corpus, "train") for _ in iter_pieces(text)) > 10
    cached = TokenCache.build(corpus, tokenizer, 16, cache_dir=tmp_path / "cache")
    expected = expected_ids(tokenizer, load_text(str(corpus)))
    assert stream(cached).tolist() == expected
    assert (cached.tokens, cached.dtype, cached.label) == (len(expected), "uint16", "corpus/")


@pytest.mark.parametrize("text", ["語" * 1000, "語" * 256 + " " * 100])
def test_text_without_a_place_to_cut(tmp_path, small_pieces, text):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    cached = TokenCache.build(tmp_path / "a.txt", Bytes(), 8, cache_dir=tmp_path / "cache")
    assert stream(cached).tolist() == [*text.encode(), 256]


def test_without_eos_a_blank_line_separates(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    tokenizer = trained(eos=None)
    cached = TokenCache.build(tmp_path / "a.jsonl", tokenizer, 4, cache_dir=tmp_path / "cache")
    assert tokenizer.decode(stream(cached).tolist()) == "one\n\ntwo\n\n"


def test_large_vocabulary_takes_four_bytes(tmp_path):
    backend = Tokenizer(models.WordLevel({"low": 65535, "high": 65536, "<eos>": 0}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    (tmp_path / "a.txt").write_text("low high")
    cached = TokenCache.build(tmp_path / "a.txt", tokenizer, 3, cache_dir=tmp_path / "cache")
    assert cached.dtype == "uint32"
    assert cached.train[0]["input_ids"].tolist() == [65535, 65536, 0]


@pytest.mark.parametrize(
    ("tokens", "window_size", "fraction", "train", "validation"),
    [
        (100, 10, 0.25, 8, 2),
        (109, 10, 0.01, 9, 1),
        (20, 10, 0.01, 1, 1),
        (20, 10, 0.99, 1, 1),
        (19, 10, 0.5, 1, 0),
        (100, 10, 0.0, 10, 0),
    ],
)
def test_windows_tile_the_stream(tmp_path, tokens, window_size, fraction, train, validation):
    (tmp_path / "a.txt").write_text("".join(chr(97 + i % 26) for i in range(tokens - 1)))
    cached = TokenCache.build(
        tmp_path / "a.txt", Bytes(), window_size, cache_dir=tmp_path / "cache", validation_fraction=fraction
    )
    assert (len(cached.train), len(cached.validation)) == (train, validation)
    items = [*cached.train, *cached.validation]
    assert (
        torch.cat([item["input_ids"] for item in items]).tolist() == stream(cached)[: len(items) * window_size].tolist()
    )
    for item in items:
        assert set(item) == {"input_ids", "labels"}
        assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
        assert item["input_ids"].shape == (window_size,)
        assert torch.equal(item["input_ids"], item["labels"])
        item["labels"].fill_(-100)  # a collator may mask labels in place
        assert -100 not in item["input_ids"]
    assert torch.equal(cached.train[-1]["labels"], cached.train[train - 1]["labels"])
    with pytest.raises(IndexError):
        cached.train[train]


@pytest.mark.parametrize(("files", "fraction"), [(1, 0.1), (3, 0.1), (5, 0.04), (7, 0.5), (7, 0.97), (90, 0.3)])
def test_windows_for_validation_end_as_many_stretches_as_there_are_files(tmp_path, files, fraction):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(files):
        (text / f"{number:02}.txt").write_text(f"{number:02}" * 35)
    cached = TokenCache.build(text, Bytes(), 5, cache_dir=tmp_path / "cache", validation_fraction=fraction)
    again = TokenCache.open(cached.path, window_size=5, validation_fraction=fraction)
    assert again == cached
    held = {cached.validation.begin_at(index) for index in range(len(cached.validation))}
    trained = {cached.train.begin_at(index) for index in range(len(cached.train))}
    assert sorted(held | trained) == list(range(0, cached.tokens // 5 * 5, 5))
    assert not held & trained
    windows = cached.tokens // 5
    assert len(held) == max(1, int(windows * fraction))
    rows = min(files, 64, len(held), len(trained))
    ends = [windows * row // rows for row in range(1, rows + 1)]
    assert {5 * (end - 1) for end in ends} <= held  # the last window of every stretch
    anywhere = cached.train_anywhere
    whole = stream(cached).tolist()
    unseen = {place for begin in held for place in range(begin, begin + 5)}
    for index in range(len(anywhere)):
        begin = anywhere.begin_at(index)
        assert anywhere[index]["input_ids"].tolist() == whole[begin : begin + 5]
        assert not unseen & set(range(begin, begin + 5))
    assert {anywhere.begin_at(index) for index in range(len(anywhere))} >= trained


def test_bad_numbers(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    for options in (
        {"window_size": 1},
        {"validation_fraction": 1.0},
        {"validation_fraction": -0.1},
        {"workers": 0},
        {"max_tokens": 0},
    ):
        name, value = next(iter(options.items()))
        with pytest.raises(InputError, match=f"{name}={value}"):
            TokenCache.build(
                tmp_path / "a.txt", Bytes(), **{"window_size": 4, "cache_dir": tmp_path / "cache"} | options
            )
    with pytest.raises(InputError, match=r"10 tokens, and one window needs 11.*block of at most 10 tokens"):
        TokenCache.build(tmp_path / "a.txt", Bytes(), 11, cache_dir=tmp_path / "cache")


def test_blank_text_leaves_nothing(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(InputError, match=r"'a\.txt' is empty"):
        TokenCache.build(tmp_path / "a.txt", Bytes(), 8, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_default_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORFOLD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text(PROSE)
    assert TokenCache.build(tmp_path / "a.txt", Bytes(), 8).path.parent == tmp_path / "cache" / "tokens"


def test_tokenised_once_for_every_block_size(corpus, tmp_path, monkeypatch):
    first = TokenCache.build(corpus, Bytes(), 8, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(Bytes, "__call__", lambda *_, **__: pytest.fail("tokenised again"))
    again = TokenCache.build(corpus, Bytes(), 32, cache_dir=tmp_path / "cache", workers=1)
    corpus.rename(tmp_path / "moved")
    moved = TokenCache.build(tmp_path / "moved", Bytes(), 8, cache_dir=tmp_path / "cache")
    assert first.path == again.path == moved.path
    assert (moved.label, again.window_size) == ("moved/", 32)


def test_key_follows_text_and_tokenizer(tmp_path, tokenizer):
    one, two = tmp_path / "1.txt", tmp_path / "2.txt"
    one.write_text(PROSE)
    two.write_text(PROSE + "!")

    def key(source, tokenizer=tokenizer, **options):
        return TokenCache.build(source, tokenizer, 8, cache_dir=tmp_path / "cache", **options).key

    lines = tmp_path / "1.jsonl"
    lines.write_text(json.dumps({"text": PROSE}))
    as_text = tmp_path / "3.txt"
    as_text.write_text(lines.read_text())
    keys = [key(one), key(two), key([one, two]), key([two, one]), key(lines), key(as_text), key(one, max_tokens=9)]
    other_end = Bytes()
    other_end.eos_token_id = 255
    keys += [
        key(one, Bytes()),
        key(one, other_end),
        key(one, trained(300)),
        key(one, trained(eos="<end>")),
        key(one, trained(eos=None)),
    ]
    assert len(set(keys)) == len(keys)

    used = trained()
    used.backend_tokenizer.enable_truncation(2)
    assert key(one, used) == keys[0]
    assert stream(TokenCache.build(two, used, 8, cache_dir=tmp_path / "other")).tolist() == expected_ids(
        tokenizer, [PROSE + "!"]
    )


def test_resuming_with_another_text_names_both_keys(tmp_path):
    (tmp_path / "a.txt").write_text(PROSE)
    older = TokenCache.build(tmp_path / "a.txt", Bytes(), 8, cache_dir=tmp_path / "cache")
    (tmp_path / "a.txt").write_text(PROSE + PROSE)
    with pytest.raises(InputError, match=f"the text or its tokenizer changed.*{older.key}"):
        TokenCache.build(tmp_path / "a.txt", Bytes(), 8, cache_dir=tmp_path / "cache", expect_key=older.key)
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [older.key]  # refused before any work
    newer = TokenCache.build(tmp_path / "a.txt", Bytes(), 8, cache_dir=tmp_path / "cache")
    with pytest.raises(InputError, match=f"{newer.key}.*{older.key}"):
        TokenCache.open(newer.path, expect_key=older.key)
    assert TokenCache.open(older.path, expect_key=older.key, window_size=8) == older


def truncate(path):
    os.truncate(path / "tokens.bin", 20)


def overwrite_head(path):
    with (path / "tokens.bin").open("r+b") as file:
        file.write(b"\0\0")


def overwrite_tail(path):
    with (path / "tokens.bin").open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\7\7")


def lose_sidecar(path):
    (path / "cache.json").unlink()


def break_sidecar(path):
    (path / "cache.json").write_text('{"tokens": 3')


def empty_sidecar(path):
    (path / "cache.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "damaged.*has 20 bytes instead of"),
        (overwrite_head, "damaged.*checksum"),
        (overwrite_tail, "damaged.*checksum"),
        (lose_sidecar, "no token cache"),
        (break_sidecar, "damaged"),
        (empty_sidecar, "damaged"),
    ],
)
def test_damaged_cache_is_found_and_built_again(tmp_path, caplog, damage, message):
    (tmp_path / "a.txt").write_text(PROSE)
    whole = TokenCache.build(tmp_path / "a.txt", Bytes(), 8, cache_dir=tmp_path / "cache")
    before = stream(whole)
    damage(whole.path)
    with pytest.raises(InputError, match=message):
        TokenCache.open(whole.path)
    again = TokenCache.build(tmp_path / "a.txt", Bytes(), 8, cache_dir=tmp_path / "cache")
    assert again == whole
    assert (stream(again) == before).all()
    assert str(whole.path) in caplog.text
    assert os.listdir(tmp_path / "cache") == [whole.key]


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def until_full(*arguments):
        yield np.zeros(8, dtype="uint16")
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    monkeypatch.setattr(data, "encode_all", until_full)
    (tmp_path / "a.txt").write_text(PROSE)
    with pytest.raises(TensorfoldError, match="disk is full"):
        TokenCache.build(tmp_path / "a.txt", Bytes(), 8, cache_dir=tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def test_text_changed_while_it_is_read(tmp_path, monkeypatch):
    def touching(pieces, encoder, workers):
        (tmp_path / "a.txt").write_text(PROSE + "more")
        return encode.encode_all(pieces, encoder, workers)

    (tmp_path / "a.txt").write_text(PROSE)
    monkeypatch.setattr(data, "encode_all", touching)
    with pytest.raises(TensorfoldError, match="changed while it was tokenised"):
        TokenCache.build(tmp_path / "a.txt", Bytes(), 8, cache_dir=tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def test_max_tokens_takes_the_beginning(corpus, tmp_path, small_pieces):
    whole = TokenCache.build(corpus, Bytes(), 8, cache_dir=tmp_path / "cache")
    some = TokenCache.build(corpus, Bytes(), 8, cache_dir=tmp_path / "cache", max_tokens=1500)
    assert some.tokens == 1500
    assert some.key != whole.key
    assert (stream(some) == stream(whole)[:1500]).all()


def test_workers_change_nothing(corpus, tmp_path, tokenizer, small_pieces):
    one = TokenCache.build(corpus, tokenizer, 8, cache_dir=tmp_path / "one")
    three = TokenCache.build(corpus, tokenizer, 8, cache_dir=tmp_path / "three", workers=3)
    for name in ("tokens.bin", "cache.json"):
        assert (one.path / name).read_bytes() == (three.path / name).read_bytes()


def test_killed_worker_is_reported(corpus, tmp_path, small_pieces):
    with pytest.raises(TensorfoldError, match="use fewer workers"):
        TokenCache.build(corpus, Fatal(), 8, cache_dir=tmp_path / "cache", workers=2)
    assert os.listdir(tmp_path / "cache") == []


def test_kill_and_start_again(corpus, tmp_path, small_pieces):
    arguments = {"cache_dir": tmp_path / "cache", "window_size": 8}
    process = multiprocessing.get_context("fork").Process(
        target=TokenCache.build, args=(corpus, Fatal()), kwargs=arguments
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [name[-8:] for name in os.listdir(tmp_path / "cache")] == [".partial"]
    again = TokenCache.build(corpus, type("Fatal", (Bytes,), {})(), **arguments)
    assert os.listdir(tmp_path / "cache") == [again.key]
    assert stream(again).tolist() == [token for text in load_text(str(corpus)) for token in [*text.encode(), 256]]


def test_memory_does_not_grow_with_the_text(tmp_path, small_pieces):
    (tmp_path / "a.txt").write_text("some words " * 200_000)
    (tmp_path / "b.jsonl").write_text((json.dumps({"text": PROSE}) + "\n") * 10_000)
    tracemalloc.start()
    try:
        cached = TokenCache.build([tmp_path / "a.txt", tmp_path / "b.jsonl"], Bytes(), 8, cache_dir=tmp_path / "cache")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert cached.tokens > 3_000_000
    assert peak < 8_000_000  # the checksum reads two megabytes at a time; either text alone would take more


def test_loader_workers_map_the_file_anew(corpus, tmp_path):
    cached = TokenCache.build(corpus, Bytes(), 16, cache_dir=tmp_path / "cache")
    train = cached.train
    expected = torch.stack([item["input_ids"] for item in train])
    assert len(pickle.dumps(train)) < 2000  # after use too, since the mapped file must not be pickled
    assert torch.equal(pickle.loads(pickle.dumps(train))[3]["input_ids"], expected[3])
    loaded = [batch["labels"] for batch in DataLoader(train, batch_size=4, num_workers=2)]
    assert torch.equal(torch.cat(loaded), expected)
