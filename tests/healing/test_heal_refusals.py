"""A refused heal changes no weight, setting or file, and the corrected call works."""

import json
import os

import pytest
import torch

import tensorfold
from tensorfold.errors import InputError
from tensorfold.healing.heal import heal

FAST = {"steps": 2, "batch": 4, "block": 16, "lr": 1e-3, "validation_fraction": 0.1}
BLOCKS = {"blockwise_tokens": 400, "blockwise_epochs": 1}

# Refusals that need a look at teacher, loss or blocks: change of the teacher, settings, message.
REFUSALS = {
    "vocabulary": ({"vocab_size": 310}, {"kl": 1}, "310; the kl term"),
    "depth": ({"num_hidden_layers": 3}, {"ffn": 1}, "the teacher 3; the ffn term"),
    "width": ({"hidden_size": 64}, {"embedding": 1}, "the teacher 64; the embedding term"),
    "heads": ({"num_attention_heads": 8}, {"attention": 1}, "attention of shapes"),
    "blocks": ({"num_hidden_layers": 3}, BLOCKS, "the teacher 3 of width 32"),
    "loss after blocks": ({"vocab_size": 310}, {"kl": 1, **BLOCKS}, "310; the kl term"),
    "windows": ({}, {"blockwise_tokens": 16}, "needed at least 2 windows"),
    "patience": (
        {},
        {"kl": 1, "patience": 2, "validation_fraction": 0},
        "patience has no effect here; it needs validation_fraction above 0",
    ),
    "no term": ({}, {"cross_entropy": 0, **BLOCKS}, "every term of the loss has weight 0"),
}


def tree(directory):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(directory.rglob("*"))}


def look(model):
    """Everything in a model that healing may change."""
    parameters = [(n, p.detach().clone(), p.dtype, p.requires_grad) for n, p in model.named_parameters()]
    return parameters, [m.training for m in model.modules()], model.config.to_dict()


def assert_same(ours, theirs):
    assert ours[1:] == theirs[1:]
    for (name, tensor, *rest), (other_name, other, *others) in zip(ours[0], theirs[0], strict=True):
        assert (name, rest) == (other_name, others)
        assert torch.equal(tensor, other), name


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_leaves_nothing_behind(case, student, teacher, tiny, tokenizer, text_file, tmp_path):
    changed, settings, message = REFUSALS[case]
    wrong = tiny("llama", **changed).train()
    student.to(torch.bfloat16)
    before = [look(model) for model in (student, wrong)]
    out = tmp_path / "deep" / "er" / "out"
    with pytest.raises(InputError, match=message):
        heal(student, text_file, wrong, tokenizer=tokenizer, out=out, **{**FAST, **settings})
    for model, was in zip((student, wrong), before, strict=True):
        assert_same(look(model), was)
    assert not list(tmp_path.iterdir())
    heal(student, text_file, teacher, tokenizer=tokenizer, out=out, **FAST)
    assert json.loads((out / "tensorfold.json").read_text())["heal"]["steps"] == 2


def test_a_refusal_that_changed_files_of_others_would_be_worse(student, tiny, tokenizer, text_file, tmp_path):
    work = tmp_path / "out.heal"
    (work / "mine").mkdir(parents=True)
    (work / "notes.txt").write_text("mine")
    found = tree(tmp_path)
    with pytest.raises(InputError, match="the kl term"):
        heal(student, text_file, tiny("llama", vocab_size=310), tokenizer=tokenizer, out=tmp_path / "out", **FAST)
    assert tree(tmp_path) == found


def test_a_run_that_finished_nothing_is_in_nobodys_way(student, tokenizer, text_file, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("tensorfold.healing.run.Run.whole", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            heal(student, text_file, tokenizer=tokenizer, out=tmp_path / "out", **FAST)
    assert (tmp_path / "out.heal" / "run.json").exists()
    report = heal(student, text_file, tokenizer=tokenizer, out=tmp_path / "out", **{**FAST, "steps": 3})
    assert report.steps == 3


def test_a_refusal_keeps_what_an_earlier_run_had_finished(
    student, teacher, tokenizer, text_file, tmp_path, monkeypatch
):
    run = {"tokenizer": tokenizer, "out": tmp_path / "out", **FAST, **BLOCKS}
    with monkeypatch.context() as patch:
        patch.setattr("tensorfold.healing.run.Run.end_to_end", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            heal(student, text_file, teacher, **run)
    found = tree(tmp_path)
    with pytest.raises(InputError, match="other settings or inputs: lr"):
        heal(student, text_file, teacher, **{**run, "lr": 0.5})
    assert tree(tmp_path) == found


def test_tensorboard_is_told_of_one_run_only(student, tokenizer, text_file, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    heal(student, text_file, tokenizer=tokenizer, out=tmp_path / "out", **FAST, report_to="tensorboard")
    assert (tmp_path / "out.runs").exists()
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


class TestCommand:
    def test_the_right_teacher_after_the_wrong_one(
        self, command, folded_directory, dense_directory, tiny, tokenizer, text_file, tmp_path
    ):
        padded = tmp_path / "padded"
        tiny("llama", vocab_size=310).save_pretrained(padded)
        tokenizer.save_pretrained(padded)
        options = ["--train", text_file, "--steps", 1, "--batch", 1, "--block", 16, "--out", tmp_path / "out"]
        first = command("heal", folded_directory, *options, "--teacher", padded)
        assert (first.status, sorted(path.name for path in tmp_path.iterdir())) == (2, ["padded"])
        assert command("heal", folded_directory, *options, "--teacher", dense_directory).status == 0

    def test_a_later_stage_is_refused_before_the_first_begins(self, refused, folded_directory, text_file, tmp_path):
        recipe = tmp_path / "r.yaml"
        stage = f"text: {text_file}, steps: 1, batch: 2, block: 16"
        recipe.write_text(
            f"fold: [{{targets: mlp, method: low-rank, keep: 0.5}}]\nheal:\n- {{{stage}}}\n- {{{stage}, kl: 1}}\n"
        )
        refused("heal", folded_directory, "--recipe", recipe, "--out", tmp_path / "out", says=["none was given"])
        assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_the_model_that_comes_back_is_usable(student, tiny, tokenizer, text_file):
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = student(ids).logits
        with pytest.raises(InputError):
            heal(student, text_file, tiny("llama", vocab_size=310), tokenizer=tokenizer, **FAST)
        assert torch.equal(student(ids).logits, before)
    assert isinstance(tensorfold.evaluate(student, tokenizer, "a b c d e f", "disjoint-8").perplexity, float)
