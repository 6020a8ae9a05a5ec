"""The windows that end-to-end healing trains on, in their order, and those that it is validated on."""

import json

import pytest
import torch

import tensorfold
from byte_tokenizer import Bytes
from tensorfold.data.token_cache import TokenCache
from tensorfold.healing.heal import heal
from tensorfold.healing.setup import RunOrder


def test_run_order_covers_the_text_before_it_repeats():
    order = list(RunOrder(10, 25, seed=1))
    assert len(order) == len(RunOrder(10, 25, seed=1)) == 25
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20]
    assert order == list(RunOrder(10, 25, seed=1)) != list(RunOrder(10, 25, seed=2))
    assert list(RunOrder(10, 12, seed=1)) == order[:12]


def test_random_draws_are_the_same_for_a_seed_and_reach_every_block():
    order = list(RunOrder(10, 200, seed=1, draws=True))
    assert order == list(RunOrder(10, 200, seed=1, draws=True)) != list(RunOrder(10, 200, seed=2, draws=True))
    assert len(order) == 200
    assert set(order) == set(range(10))
    assert len(set(order[:10])) < 10, "drawn with replacement"


def test_windows_may_begin_at_every_token_of_the_training_part(tmp_path):
    (tmp_path / "a.txt").write_text("".join(chr(97 + i % 26) for i in range(109)))
    cached = TokenCache.build(tmp_path / "a.txt", Bytes(), 10, cache_dir=tmp_path / "cache", validation_fraction=0.2)
    trained = torch.cat([cached.train[i]["input_ids"] for i in range(len(cached.train))])
    anywhere = cached.train_anywhere
    assert len(anywhere) == len(trained) - 9
    for index in (0, 1, 37, len(anywhere) - 1):
        assert torch.equal(anywhere[index]["input_ids"], trained[index : index + 10])
    with pytest.raises(IndexError):
        anywhere[len(anywhere)]


def test_random_windows_train_on_overlapping_sequences(folded_directory, tokenizer, text_file, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "tensorfold.data.windows.TokenWindows.__getitem__",
        lambda windows, index: seen.append((windows.stride, index)) or {"input_ids": torch.arange(windows.window_size)},
    )
    settings = {"steps": 2, "batch": 4, "block": 16, "validation_fraction": 0.0}
    heal(tensorfold.load(folded_directory), text_file, tokenizer=tokenizer, **settings, windows="random")
    cached = TokenCache.build(text_file, tokenizer, 16, validation_fraction=0.0)
    assert seen == [(1, index) for index in RunOrder(len(cached.train_anywhere), 8, seed=0, draws=True)]


def test_the_log_has_the_accuracy_on_the_held_out_windows(folded_directory, tokenizer, text_file, tmp_path):
    settings = {"steps": 2, "batch": 4, "micro_batch": 3, "block": 16, "lr": 1e-3, "validation_fraction": 0.1}
    out = tmp_path / "out"
    report = heal(
        tensorfold.load(folded_directory), text_file, tokenizer=tokenizer, **{**settings, "batch": 6}, out=out
    )
    assert f"2 steps, 192 tokens; kept those of step {report.step}" in str(report)
    records = [json.loads(line) for line in (out / "heal.jsonl").read_text().splitlines()]
    found = {record["step"]: record["validation_accuracy"] for record in records if "validation_loss" in record}
    assert list(found) == [0, 1, 2]

    model = tensorfold.load(folded_directory)
    held_out = TokenCache.build(text_file, tokenizer, 16, validation_fraction=0.1).validation
    ids = torch.stack([held_out[index]["input_ids"] for index in range(len(held_out))])
    with torch.no_grad():
        right = model(ids).logits[:, :-1].argmax(-1) == ids[:, 1:]
    assert found[0] == pytest.approx(right.float().mean().item(), abs=1e-6)
