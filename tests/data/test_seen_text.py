"""Texts that calibrated, trained or selected a model are recognised, however they are cut into windows."""

import json

import numpy as np
import pytest
import torch

import tensorfold
from tensorfold import LowRank, Recipe, Rule
from tensorfold.data.seen_text import Seen, hashes_of, note, noted, overlaps, with_notes
from tensorfold.data.token_cache import TokenCache
from tensorfold.healing.heal import heal
from tensorfold.hf.loading import save
from tensorfold.utils.records import read_object

BLOCK = 32
FAST = {"steps": 4, "batch": 4, "block": BLOCK, "lr": 1e-3, "validation_fraction": 0.2}


def tokens(count, seed=0):
    return np.random.default_rng(seed).integers(0, 50_000, count)


def cut(ids, length, first=0):
    return [ids[start : start + length] for start in range(first, len(ids), length)]


@pytest.mark.parametrize("count", [300, 30_000], ids=["every hash is kept", "the smallest are kept"])
@pytest.mark.parametrize("length", [50, 77, 1024])
def test_the_share_is_that_of_the_common_tokens(count, length):
    text, other = tokens(count), tokens(count, seed=1)
    seen = Seen.of("training", "text", cut(text, 100))
    assert seen.tokens == count
    assert seen.share(hashes_of(cut(text, length, first=13))) > 0.75, "cut otherwise, so stretches across cuts are lost"
    assert seen.share(hashes_of([text])) == 1
    assert seen.share(hashes_of([other])) == 0
    half = np.concatenate([text[: count // 2], other[: count // 2]])
    assert seen.share(hashes_of([half])) == pytest.approx(0.5, abs=0.06)
    assert seen.share(hashes_of([np.concatenate([text[: count // 2], tokens(9 * count, seed=2)])])) > 0.4, "of the text"


def test_what_is_too_short_has_nothing_in_common():
    seen = Seen.of("training", "text", [tokens(300)])
    for windows in ([], [tokens(11)], [tokens(0)]):
        assert seen.share(hashes_of(windows)) == 0
    assert Seen.of("training", "text", [tokens(5)]).share(hashes_of([tokens(300)])) == 0


def test_notes_are_kept_in_cards_each_once(tmp_path):
    model = torch.nn.Linear(1, 1)
    one, two = (Seen.of("training", name, [tokens(100, seed)]) for seed, name in enumerate("ab"))
    assert with_notes({"a": 1}, model) == {"a": 1}
    note(model, [one])
    card = with_notes({"a": 1}, model)
    note(model, [two, one])
    card = json.loads(json.dumps(with_notes(card, model)))
    (tmp_path / "tensorfold.json").write_text(json.dumps(card))
    loaded = torch.nn.Linear(1, 1)
    loaded.name_or_path = str(tmp_path)
    assert noted(loaded) == [one, two]


@pytest.mark.parametrize(
    "card",
    ["[]", "{", '{"seen_text": 3}', '{"seen_text": [3, {"purpose": "x"}, null]}',
     '{"seen_text": [{"purpose": "training", "text": "a", "tokens": 3, "sketch": "%%%"}]}',
     '{"seen_text": [{"purpose": "training", "text": "a", "tokens": 3, "sketch": "AAAA"}]}'],
)  # fmt: skip
def test_a_card_that_is_none_says_nothing(tmp_path, card):
    (tmp_path / "tensorfold.json").write_text(card)
    model = torch.nn.Linear(1, 1)
    model.name_or_path = str(tmp_path)
    assert overlaps(model, [tokens(100)]) == []


@pytest.fixture(scope="module")
def documents(tokenizer):
    """Three texts without repetition: for the fold, for healing, and one that no model has seen."""
    words = [word for word in tokenizer.get_vocab() if word.isalpha() and word.isascii()]

    def text(seed):
        picked = np.random.default_rng(seed).choice(words, 1500)
        return " ".join(picked)

    return {"calibration": text(1), "healing": text(2), "held out": text(3)}


@pytest.fixture(scope="module")
def healed(tiny, tokenizer, documents, tmp_path_factory):
    """Directories of a calibrated fold and of its healed copy, and that copy in memory. Read only."""
    path = tmp_path_factory.mktemp("seen")
    model = tiny("llama")
    fold = Recipe((Rule("mlp", LowRank(keep=0.5)),))
    report = tensorfold.fold(model, fold, tokenizer, [documents["calibration"]], calibration_tokens=600)
    save(model, tokenizer, path / "folded", report.to_dict())
    (path / "text.txt").write_text(documents["healing"])
    model = tensorfold.load(path / "folded")
    heal(model, path / "text.txt", tokenizer=tokenizer, out=path / "healed", **FAST)
    return path, model


def purposes(model, tokenizer, text):
    found = tensorfold.evaluate(model, tokenizer, text, "disjoint-64").seen
    return {entry["purpose"]: entry["share"] for entry in found}


@pytest.mark.parametrize("where", ["memory", "directory"])
def test_evaluations_say_what_text_the_model_knows(healed, tokenizer, documents, where):
    path, model = healed
    model = model if where == "memory" else tensorfold.load(path / "healed")
    cache = TokenCache.build(path / "text.txt", tokenizer, BLOCK, validation_fraction=0.2)
    first = cache.validation.begin_at(0)
    ids = torch.cat([cache.train[i]["input_ids"] for i in range(len(cache.train))])
    trained, chosen = (
        tokenizer.decode(ids),
        tokenizer.decode(torch.cat([cache.validation[i]["input_ids"] for i in range(len(cache.validation))])),
    )
    assert first == len(ids)
    assert purposes(model, tokenizer, documents["held out"]) == {}
    assert purposes(model, tokenizer, documents["calibration"]).keys() == {"calibration"}
    assert purposes(model, tokenizer, chosen) == {"selection": pytest.approx(1, abs=0.35)}
    assert purposes(model, tokenizer, trained) == {"training": pytest.approx(1, abs=0.35)}
    assert purposes(model, tokenizer, documents["healing"]).keys() == {"training", "selection"}


def test_the_card_names_the_windows_that_chose(healed, tokenizer):
    path, _ = healed
    chosen = read_object(path / "healed" / "tensorfold.json")["heal"]["selected_on"]
    cache = TokenCache.build(path / "text.txt", tokenizer, BLOCK, validation_fraction=0.2)
    assert chosen["text"] == "text.txt"
    assert (chosen["cache"], chosen["length"]) == (cache.key, BLOCK)
    assert chosen["begin_at"] == [cache.validation.begin_at(i) for i in range(len(cache.validation))]


def test_without_validation_nothing_chose(healed, tokenizer, tmp_path):
    path, _ = healed
    model = tensorfold.load(path / "folded")
    heal(model, path / "text.txt", tokenizer=tokenizer, out=tmp_path / "out", **{**FAST, "validation_fraction": 0})
    card = read_object(tmp_path / "out" / "tensorfold.json")
    assert card["heal"]["selected_on"] is None
    assert [entry["purpose"] for entry in card["seen_text"]] == ["calibration", "training"]


def test_what_came_in_again_was_chosen_but_not_trained(healed, tokenizer):
    path, _ = healed
    model = tensorfold.load(path / "folded")
    report = heal(model, path / "text.txt", tokenizer=tokenizer, **{**FAST, "lr": 1.0}, schedule="constant")
    assert report.kept == "start"
    assert [seen.purpose for seen in noted(model)] == ["calibration", "selection"]


@pytest.mark.parametrize("windows", ["packed", "random"])
def test_what_trains_is_what_is_noted(healed, tokenizer, windows):
    path, _ = healed
    model = tensorfold.load(path / "folded")
    heal(model, path / "text.txt", tokenizer=tokenizer, **{**FAST, "steps": 1}, windows=windows)
    seen = {each.purpose: each.tokens for each in noted(model)}
    assert 0 < seen["training"] <= 4 * BLOCK


def test_an_evaluation_of_a_model_without_notes_says_nothing(tiny, tokenizer, documents):
    result = tensorfold.evaluate(tiny("llama"), tokenizer, documents["calibration"], "disjoint-64")
    assert result.seen == []
    assert "\n" not in str(result)


class TestCommand:
    def test_line_json_and_table_say_so(self, command, healed, tmp_path):
        path, _ = healed
        call = ["eval", path / "healed", "--text", path / "text.txt", "--protocol", "disjoint-64", "--record"]
        plain = command(*call)
        assert "not held out" in plain.out
        assert "the healed weights were selected by (text.txt)" in plain.out
        found = json.loads(command(*call, "--json").out)["seen"]
        assert {entry["purpose"] for entry in found} == {"training", "selection"}
        evaluations = [json.loads(line) for line in (path / "healed" / "tensorfold-evaluations.jsonl").open()]
        assert evaluations[-1]["seen"] == found
        noted = read_object(path / "healed" / "tensorfold.json")
        card = tensorfold.hf.model_card.model_card(noted, evaluations=evaluations)
        assert "text.txt (not held out)" in card
        page = tmp_path / "report.html"
        assert command("report", path / "healed", "--out", page, "--no-samples").status == 0
        assert "on text that is not held out" in page.read_text()
