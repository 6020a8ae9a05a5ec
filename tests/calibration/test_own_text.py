"""Text that a model writes itself: repeatable, from its own beginning, cached, known by the name ``self``."""

import json
import math
from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer

import tensorfold
from tensorfold import Recipe
from tensorfold.calibration import own_text as module
from tensorfold.calibration.own_text import documents_of, own_text
from tensorfold.errors import InputError, TensorfoldError
from tensorfold.healing.heal import heal
from tensorfold.recipes.settings import HealSettings
from tensorfold.utils import torch_modes


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "own-text"


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(module, "_LENGTH", 24)


def test_it_is_the_same_at_every_call_and_for_no_other_seed(cache, tiny, tokenizer):
    first = own_text(tiny("llama"), tokenizer, 100)
    [folder] = cache.iterdir()
    for file in folder.iterdir():
        file.unlink()
    assert own_text(tiny("llama"), tokenizer, 100) == first
    assert own_text(tiny("llama"), tokenizer, 100, seed=1) != first


def test_more_tokens_begin_with_fewer_ones(cache, tiny, tokenizer):
    model = tiny("llama")
    fewer, more = own_text(model, tokenizer, 100), own_text(model, tokenizer, 1200)
    assert more[: len(fewer)] == fewer
    assert sum(len(tokenizer(text)["input_ids"]) for text in more) > 1000


def test_what_was_written_is_read_again_and_damage_is_written_anew(cache, tiny, tokenizer, monkeypatch):
    model = tiny("llama")
    first = own_text(model, tokenizer, 100)
    [file] = cache.glob("*/*.json")
    file.write_text("{", encoding="utf-8")
    assert own_text(model, tokenizer, 100) == first
    assert json.loads(file.read_text(encoding="utf-8"))["documents"] == first
    monkeypatch.setattr(module, "_sampled", lambda *_: pytest.fail("it was there"))
    assert own_text(model, tokenizer, 100) == first


def test_draws_have_the_models_own_probabilities(cache, tiny, tokenizer, monkeypatch):
    """The first token of every document, against the softmax behind the beginning of a text (256 draws, χ² at 1e-4)."""
    model = tiny("llama")
    torch.manual_seed(1)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[5:9] = torch.randn(4, 32)
        model.lm_head.weight[5:9] *= 3
        expected = model(torch.tensor([[tokenizer.bos_token_id]])).logits[0, -1].softmax(-1)
    monkeypatch.setattr(module, "_ROWS", 256)
    monkeypatch.setattr(module, "_LENGTH", 1)
    rows = list(module._sampled(model, tokenizer, (tokenizer.bos_token_id,), "0" * 15))
    drawn = Counter(token for row in rows for token in row)
    groups = [*({token} for token in range(5, 9)), set(range(300)) - set(range(5, 9))]
    counts = [(sum(drawn[t] for t in g), 256 * sum(expected[t].item() for t in g)) for g in groups]
    assert sum((seen - mean) ** 2 / mean for seen, mean in counts) < 23.5  # χ² of four degrees of freedom


def test_documents_end_with_the_end_of_text_token(cache, tiny, tokenizer):
    model = tiny("llama")
    rows = list(module._sampled(model, tokenizer, (0,), "0" * 15))
    assert len(rows) == 32
    assert all(tokenizer.eos_token_id not in row for row in rows)
    assert max(map(len, rows)) == 24


def test_a_model_whose_logits_are_not_finite_is_refused(cache, tiny, tokenizer):
    model = tiny("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(TensorfoldError, match=r"model\.norm\.weight holds NaN"):
        own_text(model, tokenizer, 100)


def test_a_model_that_writes_nothing_is_refused(cache, tiny, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "_sampled", lambda *_: iter([[]] * 32))
    with pytest.raises(InputError, match="wrote nothing in 256 attempts"):
        own_text(tiny("llama"), tokenizer, 100)


def test_a_beginning_is_needed(cache, tiny, tokenizer):
    model = tiny("llama")
    model.config.bos_token_id = model.config.eos_token_id = None
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="beginning- or end-of-text"):
        own_text(model, bare, 100)


def test_the_word_names_it_and_a_path_does_not(cache, tiny, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self").write_text("a file", encoding="utf-8")
    model = tiny("llama")
    assert documents_of("./self", model, tokenizer, 100, split="test") == [["a file"]]
    assert documents_of("self", model, tokenizer, 100, split="test") == [own_text(model, tokenizer, 100)]


def test_fold_calibrates_on_it(command, cache, workplace, dense_directory):
    outcome = command(
        "fold", dense_directory, "--keep", "0.5", "--calibrate", "self", "--tokens", "200", "--out", "o", "--json"
    )
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out)["calibration_tokens"] > 100
    card = json.loads((workplace / "o" / "tensorfold.json").read_text(encoding="utf-8"))
    assert card["calibration"].endswith("tokens of text that the model wrote itself")


def test_fold_calibrates_on_it_and_on_another_text_in_equal_shares(command, cache, workplace, dense_directory, prose):
    (workplace / "text.txt").write_text(prose, encoding="utf-8")
    both = ("--calibrate", "text.txt", "--calibrate", "self", "--tokens", "200")
    outcome = command("fold", dense_directory, "--keep", "0.5", *both, "--out", "options", "--json")
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out)["calibration_tokens"] == 200
    card = json.loads((workplace / "options" / "tensorfold.json").read_text(encoding="utf-8"))
    assert card["calibration"] == "200 tokens of text.txt and text that the model wrote itself"
    (workplace / "recipe.yaml").write_text(
        "fold: [{targets: mlp, method: auto, keep: 0.5}]\ncalibrate: {text: [text.txt, self], tokens: 200}\n"
    )
    again = command("fold", dense_directory, "--recipe", "recipe.yaml", "--out", "recipe")
    assert again.status == 0, again.err
    model, tokenizer = tensorfold.load(dense_directory), AutoTokenizer.from_pretrained(dense_directory)
    texts = documents_of(["text.txt", "self"], model, tokenizer, 200, split="validation")
    tensorfold.fold(model, Recipe.keep(0.5), tokenizer, texts, calibration_tokens=200)
    model.save_pretrained("python")
    weights = [(workplace / way / "model.safetensors").read_bytes() for way in ("options", "recipe", "python")]
    assert weights[0] == weights[1] == weights[2]


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (("none", "self"), "--calibrate none and another text"),
        (("self", "self"), "text 'self' is given 2 times"),
        (("self", "absent.txt"), "absent.txt"),
    ],
)
def test_texts_that_do_not_go_together_are_refused_before_a_model_is_loaded(refused, workplace, texts, says):
    options = [part for text in texts for part in ("--calibrate", text)]
    refused("fold", "no-model", "--keep", "0.5", *options, "--out", "o", says=[says])


def test_fold_takes_it_where_no_text_is_named(command, cache, workplace, dense_directory, monkeypatch):
    monkeypatch.setattr("tensorfold.cli.fold._UNASKED", 200)
    half = ("fold", dense_directory, "--keep", "0.5", "--json")
    found = {}
    for name, options in {"unasked": (), "asked": ("--calibrate", "self", "--tokens", "200")}.items():
        outcome = command(*half, *options, "--out", name)
        assert outcome.status == 0, outcome.err
        weights = (workplace / name / "model.safetensors").read_bytes()
        found[name] = json.loads(outcome.out)["calibration_tokens"], weights
    assert found["unasked"] == found["asked"]


def test_a_model_without_a_tokenizer_is_folded_without_text(command, cache, workplace, tiny):
    tiny("llama").save_pretrained("bare")
    outcome = command("fold", "bare", "--keep", "0.5", "--out", "o", "--json")
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out)["calibration_tokens"] == 0
    assert "folded without text, at a price in quality: there is no tokenizer" in outcome.err


def test_a_model_that_cannot_write_is_folded_without_text(command, cache, workplace, dense_directory, monkeypatch):
    monkeypatch.setattr(module, "_sampled", lambda *_: [[]])
    outcome = command("fold", dense_directory, "--keep", "0.5", "--out", "o", "--json")
    assert outcome.status == 0, outcome.err
    assert "at a price in quality: own text: the model wrote nothing" in outcome.err
    assert command("fold", dense_directory, "--keep", "0.5", "--calibrate", "self", "--out", "p").status == 2


def test_a_recipe_can_name_it(cache, tiny, tokenizer):
    recipe = {
        "fold": [{"targets": "mlp", "method": "low-rank", "keep": 0.5}], "calibrate": {"text": "self", "tokens": 200},
    }  # fmt: skip
    named, given = tiny("llama"), tiny("llama")
    tensorfold.fold(named, recipe, tokenizer)
    tensorfold.fold(given, recipe, tokenizer, own_text(tiny("llama"), tokenizer, 200))
    assert all(a.equal(b) for a, b in zip(named.parameters(), given.parameters(), strict=True))


def test_heal_trains_on_what_a_teacher_writes(command, cache, workplace, folded_directory, text_file, dense_directory):
    given = ("--teacher", dense_directory, "--steps", "2", "--batch", "2", "--block", "16", "--out", "o", "--json")
    outcome = command("heal", folded_directory, "--train", "self", "--train", text_file, *given)
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out)["text"] == "text that the model wrote itself + prose.txt"


def test_healing_in_python_takes_the_word(cache, student, teacher, tokenizer):
    settings = HealSettings(steps=2, batch=2, block=16)
    report = heal(student, "self", teacher, tokenizer=tokenizer, settings=settings)
    assert report.text == "text that the model wrote itself"


def test_a_model_in_float32_writes_in_bfloat16_where_the_processor_multiplies_it(tiny, tokenizer, monkeypatch):
    """Its weights stay float32, and a model whose code bears no other dtype writes in float32."""
    monkeypatch.setattr(torch_modes, "multiplies_bfloat16", lambda: True)
    model, seen = tiny("llama"), []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0].dtype, module.weight.dtype)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = list(module._sampled(model, tokenizer, (tokenizer.bos_token_id,), "0" * 15))
    assert len(rows) == module._ROWS
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def only_float32(_, inputs):
        if inputs[0].dtype != torch.float32:
            raise RuntimeError("expected m1 and m2 to have the same dtype")

    seen.clear()
    model.model.norm.register_forward_pre_hook(only_float32)
    assert len(list(module._sampled(model, tokenizer, (tokenizer.bos_token_id,), "0" * 15))) == module._ROWS
    assert set(seen) == {(torch.float32, torch.float32)}
