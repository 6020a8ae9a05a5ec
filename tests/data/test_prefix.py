"""Every window begins with what the tokenizer puts before a document, and with nothing else."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from tokenizers import processors

from byte_tokenizer import Bytes, sentence_pairs
from tensorfold import Recipe, evaluate, fold, heal
from tensorfold.calibration import gradients
from tensorfold.calibration.block_stream import BlockStream
from tensorfold.calibration.gradients import gradient_moments
from tensorfold.calibration.windows import calibration_windows
from tensorfold.data.token_cache import TokenCache
from tensorfold.data.tokens import Encoder, prefix_of
from tensorfold.errors import InputError
from tensorfold.evaluation.sampling import prompt_ids

# Template of the post-processor -> ids before a document; <s> is 0 and </s> is 1.
TEMPLATES = {
    "none": (None, ()),
    "bos": ("<s> $A", (0,)),
    "bos and eos": ("<s> $A </s>", (0,)),
    "eos": ("$A </s>", ()),
    "two": ("<s> </s> $A", (0, 1)),
    "bos twice": ("<s> <s> $A <s>", (0, 0)),
}
MLP = Recipe.from_dict({"fold": [{"targets": "mlp", "method": "low-rank", "keep": 0.5}]})


def built(template, text):
    tokenizer = sentence_pairs(text)
    if template is not None:
        names = [("<s>", 0), ("</s>", 1)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[name for name in names if name[0] in template]
        )
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers(prose):
    return {name: built(template, prose) for name, (template, _) in TEMPLATES.items()}


@pytest.fixture
def fed(monkeypatch):
    """Record the token ids of every forward pass of a model, a list for each window."""

    def watch(model):
        rows = []
        model.register_forward_pre_hook(
            lambda _, args, kwargs: rows.extend((args[0] if args else kwargs["input_ids"]).tolist()), with_kwargs=True
        )
        return rows

    return watch


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_prefix_is_what_comes_before_a_document(tokenizers, kind):
    tokenizer, prefix = tokenizers[kind], TEMPLATES[kind][1]
    bare = tokenizer("some text", add_special_tokens=False)["input_ids"]
    assert prefix_of(tokenizer) == prefix
    assert Encoder(tokenizer)("some text") == [*prefix, *bare]


def test_one_that_begins_and_ends_by_the_same_token(prose):
    tokenizer = built("</s> $A </s>", prose)
    tokenizer.bos_token = "</s>"
    assert prefix_of(tokenizer) == (1,)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    assert prefix_of(tokenizer) == ()


def test_a_mere_map_from_text_to_ids_adds_none():
    assert prefix_of(Bytes()) == ()


@pytest.mark.parametrize("protocol", ["disjoint-16", "hf-512", "krony", "lambada"])
@pytest.mark.parametrize("kind", ["bos", "bos and eos", "two"])
def test_evaluation_windows_begin_with_it_and_predict_the_same_tokens(
    tiny, tokenizers, prose, fed, monkeypatch, kind, protocol
):
    from tensorfold.evaluation import protocols

    for name in ("hf-512", "krony"):  # with tiny windows
        rule = protocols.PROTOCOLS[name]
        shorter = {"length": 16, "stride": rule.stride // 64}
        monkeypatch.setitem(protocols.PROTOCOLS, name, dataclasses.replace(rule, **shorter))
    prefix, model = TEMPLATES[kind][1], tiny("llama", max_position_embeddings=16)
    text = [line + " word" for line in prose.split("\n")[:3]] if protocol == "lambada" else prose[:300]
    text = [each[:20] + each[-5:] for each in text] if protocol == "lambada" else text
    plain = evaluate(model, tokenizers["none"], text, protocol)
    rows = fed(model)
    result = evaluate(model, tokenizers[kind], text, protocol, batch_size=3)
    assert rows
    for row in rows:
        assert tuple(row[: len(prefix)]) == prefix
        assert len(row) <= 16
        assert 1 not in row[len(prefix) :]
    if protocol == "lambada":
        assert result.tokens == plain.tokens
    assert result.prefix == prefix
    assert result.to_dict()["prefix"] == list(prefix)
    assert result.window == (None if protocol == "lambada" else 16)
    assert f"begin with token {prefix[0]}" in str(result)
    assert plain.prefix == ()
    assert "begin" not in str(plain)


def test_evaluation_against_a_forward_pass_by_hand(tiny, tokenizers, prose):
    """The stream is the prefix and the text; windows of 8 after the first have the prefix before them."""
    model, tokenizer = tiny("llama"), tokenizers["bos"]
    ids = [0, *tokenizer(prose[:200], add_special_tokens=False)["input_ids"]]
    losses = []
    for start in range(0, len(ids), 8):
        part = ids[start : start + 8]
        window = part if start == 0 else [0, *part]
        logits = model(torch.tensor([window])).logits[0, :-1]
        scored = len(part) - 1
        if scored:
            losses += F.cross_entropy(logits[-scored:], torch.tensor(part[-scored:]), reduction="none").tolist()
    result = evaluate(model, tokenizer, prose[:200], "disjoint-8")
    assert result.tokens == len(losses)
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_a_prefix_that_leaves_too_little_of_the_context_names_the_window_that_fits(tiny, tokenizers, prose):
    tokenizer = built("<s> <s> <s> $A", prose)
    model = tiny("llama", max_position_embeddings=16)
    with pytest.raises(InputError, match="use disjoint-14"):
        evaluate(model, tokenizer, prose[:200], "disjoint-16")
    assert evaluate(model, tokenizer, prose[:200], "disjoint-14").prefix == (0, 0, 0)


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize(("tokens", "limit"), [(1000, 128), (100, 128), (257, 64), (9, 4)])
def test_calibration_windows_begin_with_it(tokenizers, prose, kind, tokens, limit):
    prefix = TEMPLATES[kind][1]
    windows = calibration_windows(tokenizers[kind], [prose], tokens, limit)
    assert windows.shape[1] <= limit
    assert tokens - 2 * limit < windows.numel() <= tokens
    assert all(tuple(row[: len(prefix)]) == prefix for row in windows.tolist())
    text = windows[:, len(prefix) :].flatten().tolist()
    assert text == tokenizers["none"](prose)["input_ids"][: len(text)]


def test_calibration_needs_room_for_text_behind_the_prefix(tokenizers, prose):
    with pytest.raises(InputError, match="windows of 2 tokens"):
        calibration_windows(tokenizers["two"], [prose], 100, 2)
    with pytest.raises(InputError, match="needed at least 3"):
        calibration_windows(tokenizers["two"], [prose], 2, 64)


def test_gradients_are_of_pieces_that_begin_with_it(tiny, tokenizers, prose, monkeypatch):
    model, windows = tiny("llama"), calibration_windows(tokenizers["two"], [prose], 36, 12)
    layer = model.model.layers[0].mlp.down_proj
    expected, tokens = torch.zeros(layer.out_features, layer.out_features), 0
    for window in windows:
        for text in window[2:].split(4):
            piece = torch.cat([torch.tensor([0, 1]), text])
            seen = []
            handle = layer.register_full_backward_hook(lambda _, __, out, seen=seen: seen.append(out[0][0]))
            logits = model(piece[None]).logits[0]
            if len(text) > 1:  # the prefix and the text's first token are not predicted
                F.cross_entropy(logits[2:-1], piece[3:], reduction="sum").backward()
                expected += seen[0].T @ seen[0]
            tokens += len(piece)
            handle.remove()
    monkeypatch.setattr(gradients, "_WINDOW", 4)
    found = gradient_moments(model, windows, {"down": layer}, prefix=2)["down"].full()
    torch.testing.assert_close(found, expected / tokens, rtol=1e-4, atol=1e-7)


def test_a_fold_by_budget_measures_on_windows_that_begin_with_it(tiny, tokenizers, prose, fed):
    dense = tiny("llama", max_position_embeddings=64)
    rows = fed(dense)
    recipe = Recipe.from_dict({"fold": [{"targets": "mlp", "method": "auto", "keep": 0.5, "effort": "low"}]})
    report = fold(dense, recipe, tokenizers["bos"], [prose], calibration_tokens=400)
    assert rows
    assert all(row[0] == 0 for row in rows)
    given = report.to_dict()
    assert (given["calibration_prefix"], given["calibration_window"]) == ([0], 57)
    assert given["calibration_tokens"] == 399
    assert fold(tiny("llama"), MLP).to_dict()["calibration_prefix"] == []


@pytest.mark.parametrize("kind", TEMPLATES)
def test_windows_for_healing_begin_with_it(tokenizers, text_file, tmp_path, kind):
    prefix, tokenizer = TEMPLATES[kind][1], tokenizers[kind]
    cache = TokenCache.build(text_file, tokenizer, 16, cache_dir=tmp_path, validation_fraction=0.1)
    plain = tokenizers["none"](text_file.read_text())["input_ids"]
    text = []
    for windows in (cache.train, cache.validation):
        for index in range(len(windows)):
            item = windows[index]
            assert item["input_ids"].shape == (16,)
            assert tuple(item["input_ids"][: len(prefix)].tolist()) == prefix
            assert (item["labels"][: len(prefix)] == -100).all()
            assert item["labels"][len(prefix) :].equal(item["input_ids"][len(prefix) :])
            text += item["input_ids"][len(prefix) :].tolist()
    assert text == [*plain, 1][: len(text)]  # the document's end is its only </s>
    assert len(plain) - len(text) < 16
    shifted = cache.train_anywhere[1]["input_ids"].tolist()
    assert shifted == [*prefix, *plain[1 : 17 - len(prefix)]]
    assert cache.prefix == prefix
    assert TokenCache.open(cache.path, window_size=16, validation_fraction=0.1) == cache


def test_the_key_of_a_cache_follows_the_prefix(text_file, tmp_path):
    class Slow(Bytes):
        """A tokenizer without a backend, whose state would tell it from others."""

        bos_token_id, opening = 256, ()

        def __call__(self, texts, add_special_tokens=True, **_):
            if isinstance(texts, str):
                return {"input_ids": [*(self.opening if add_special_tokens else ()), *texts.encode()]}
            return {"input_ids": [list(text.encode()) for text in texts]}

    slow = Slow()
    none = TokenCache.build(text_file, slow, 16, cache_dir=tmp_path)
    slow.opening = (256,)
    some = TokenCache.build(text_file, slow, 16, cache_dir=tmp_path)
    assert none.key != some.key
    assert (none.prefix, some.prefix) == ((), (256,))
    assert none.key == TokenCache.build(text_file, Slow(), 16, cache_dir=tmp_path).key


@pytest.mark.parametrize("stages", [{"steps": 2, "batch": 2}, {"steps": 0, "blockwise_tokens": 64}])
def test_healing_trains_and_judges_on_windows_that_begin_with_it(tiny, tokenizers, text_file, fed, stages):
    dense, student = tiny("llama"), tiny("llama")
    fold(student, MLP)
    rows = fed(student)
    report = heal(student, text_file, dense, tokenizer=tokenizers["two"], block=16, validation_fraction=0.1, **stages)
    assert rows
    assert all(row[:2] == [0, 1] and len(row) == 16 for row in rows)
    assert (report.window, report.prefix) == (16, (0, 1))
    assert report.to_dict()["prefix"] == [0, 1]
    assert "begins with token 0 1" in str(report)


def test_the_prefix_is_context_and_not_part_of_the_loss(tiny, tokenizers, text_file, tmp_path):
    """The validation loss is the mean over windows of the text's cross-entropy behind a prefix of two tokens."""
    model = tiny("llama")
    fold(model, MLP)
    windows = TokenCache.build(text_file, tokenizers["two"], 16, cache_dir=tmp_path, validation_fraction=0.1).validation
    losses = []
    for index in range(len(windows)):
        ids = windows[index]["input_ids"]
        losses.append(F.cross_entropy(model(ids[None]).logits[0, 1:-1], ids[2:]).item())
    report = heal(
        model, text_file, tokenizer=tokenizers["two"], steps=1, block=16, batch=2, lr=1e-9, validation_fraction=0.1
    )
    assert len(losses) <= 64  # all windows are validated on
    assert report.validation_loss_before == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_a_prompt_begins_with_it(tiny, tokenizers):
    model = tiny("llama")
    assert prompt_ids(tokenizers["two"], None, model) == [0, 1]
    assert prompt_ids(tokenizers["none"], None, model) == [0]
    assert prompt_ids(tokenizers["bos and eos"], "a", model)[0] == 0


# Ids beyond the table, found before the model runs.


@pytest.fixture
def wider(tokenizers, prose):
    """A tokenizer with a token that a model of 300 lacks, and text that ends in it."""
    tokenizer = built(None, prose)
    tokenizer.add_tokens(["<new>"])
    return tokenizer, [f"{prose[:1500]} <new> {prose[:20]}"]


def _search(model, *given):
    recipe = Recipe.from_dict({"fold": [{"targets": "mlp", "method": "auto", "keep": 0.5}]})
    return fold(model, recipe, *given, calibration_tokens=10_000)


USERS = {
    "eval": lambda model, tokenizer, text: evaluate(model, tokenizer, text, "disjoint-32"),
    "calibration": lambda model, *given: fold(model, MLP, *given, calibration_tokens=10_000),
    "search": _search,
    "heal": lambda model, tokenizer, text: heal(model, text, tokenizer=tokenizer, steps=1, block=16),
    "sample": lambda model, tokenizer, text: prompt_ids(tokenizer, text[0], model),
}


@pytest.mark.parametrize("user", USERS)
def test_a_token_beyond_the_table_is_named_before_the_model_runs(tiny, wider, fed, user, monkeypatch):
    model = tiny("llama")
    if user == "heal":
        fold(model, MLP)
    rows = fed(model)
    with pytest.raises(InputError, match=r"token id 300 \('<new>'\).*300 rows.*resize_token_embeddings\(301\)"):
        USERS[user](model, *wider)
    assert rows == []


def test_a_teacher_with_a_smaller_table_is_named(tiny, wider, fed):
    student = tiny("llama", vocab_size=320)
    fold(student, MLP)
    with pytest.raises(InputError, match=r"teacher: .*token id 300"):
        heal(student, wider[1], tiny("llama"), tokenizer=wider[0], steps=1, block=16)


def test_a_tokenizer_with_more_tokens_than_the_text_uses_will_do(tiny, wider, prose):
    model = tiny("llama")
    fold(model, MLP, wider[0], [prose], calibration_tokens=500)
    assert heal(model, [prose], tokenizer=wider[0], steps=1, block=16).steps == 1


@pytest.mark.parametrize("run", [BlockStream, lambda model, ids: gradient_moments(model, ids, {})])
def test_windows_given_directly_are_checked(tiny, run):
    with pytest.raises(InputError, match="token id 301"):
        run(tiny("llama"), torch.tensor([[3, 301, 5]]))
