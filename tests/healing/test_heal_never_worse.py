"""A healed model is never worse on its validation split than before, and the report says where nothing helped."""

import json
import logging

import pytest
import torch

import tensorfold
from tensorfold.data.token_cache import TokenCache
from tensorfold.errors import TensorfoldError
from tensorfold.healing.heal import heal
from tensorfold.healing.logit_losses import cross_entropy

FAST = {"steps": 6, "batch": 4, "block": 16, "validation_fraction": 0.1, "evaluate_every": 2, "schedule": "constant"}
RUINOUS = {**FAST, "lr": 1.0}
GENTLE = {**FAST, "lr": 1e-3}
UNJUDGED = {key: value for key, value in RUINOUS.items() if key != "evaluate_every"}
ONLY_BLOCKS = {"steps": 0, "block": 16, "validation_fraction": 0.1}
BLOCKS = {"blockwise_tokens": 400, "blockwise_epochs": 2}


@pytest.fixture
def call(folded_directory, tokenizer, text_file):
    """Heal a fresh copy of the folded model; returns the model and the report."""

    def run(*teacher, dtype=None, **settings):
        model = tensorfold.load(folded_directory)
        model.to(dtype or torch.float32)
        return model, heal(model, text_file, *teacher, tokenizer=tokenizer, **settings)

    return run


@pytest.fixture
def came_in(folded_directory):
    return tensorfold.load(folded_directory)


@pytest.fixture
def judge(tokenizer, text_file):
    """Loss on the validation split, from the tokens of the text itself."""

    def loss(model):
        split = TokenCache.build(text_file, tokenizer, 16, validation_fraction=0.1).validation
        ids = [split[index]["input_ids"][None] for index in range(len(split))]
        with torch.no_grad():
            return sum(cross_entropy(model.to(torch.float32).eval()(each).logits, each).item() for each in ids) / len(
                ids
            )

    return loss


@pytest.fixture
def hostile(tiny):
    """A dense model that the student was not folded from, and so a bad teacher."""
    model = tiny("llama")
    with torch.no_grad():
        for number, parameter in enumerate(model.model.layers.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return model


def equal(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return all(torch.equal(ours[name], theirs[name].to(ours[name].dtype)) for name in theirs)


def assert_nothing_helped(report):
    assert (report.helped, report.kept, report.step) == (False, "start", 0)
    assert report.validation_loss == report.validation_loss_before is not None
    assert str(report).startswith("nothing helped: the model is as it came in")


def test_steps_that_only_harm_are_undone(call, came_in, judge, tmp_path, caplog):
    model, report = call(**RUINOUS, out=tmp_path / "out")
    assert_nothing_helped(report)
    assert report.steps == 6
    assert "kept none of them" in str(report)
    assert "nothing helped" in caplog.text
    assert equal(model, came_in)
    assert equal(tensorfold.load(tmp_path / "out"), came_in)
    assert judge(model) == pytest.approx(report.validation_loss, rel=1e-5)
    card = json.loads((tmp_path / "out" / "tensorfold.json").read_text())["heal"]
    assert (card["helped"], card["kept"]) == (False, "start")
    records = [json.loads(line) for line in (tmp_path / "out" / "heal.jsonl").read_text().splitlines()]
    assert records[-1] == {"step": 0, "kept": "start", "helped": False}
    assert min(r["validation_loss"] for r in records if "validation_loss" in r) == report.validation_loss
    assert "nothing helped" in (tmp_path / "out" / "README.md").read_text()


def test_steps_that_help_are_kept(call, judge, came_in):
    model, report = call(**GENTLE)
    assert (report.helped, report.kept) == (True, "steps")
    assert judge(model) < judge(came_in)
    assert "nothing helped" not in str(report)


def test_without_a_validation_split_nothing_is_judged(call, came_in):
    model, report = call(**{**UNJUDGED, "validation_fraction": 0})
    assert (report.helped, report.kept, report.step) == (None, "steps", 6)
    assert not equal(model, came_in)


def test_the_last_step_is_kept_where_it_is_asked_for_and_is_called_worse(call, came_in, judge, caplog):
    model, report = call(**RUINOUS, select="last")
    assert (report.helped, report.kept, report.step) == (False, "steps", 6)
    assert judge(model) == pytest.approx(report.validation_loss, rel=1e-5)
    assert report.validation_loss > report.validation_loss_before
    assert "worse than what came in" in str(report)
    assert "worse than what came in" in caplog.text


def test_blocks_that_harm_are_undone(call, came_in, hostile):
    model, report = call(hostile, **ONLY_BLOCKS, **BLOCKS)
    assert any(block["healed"] for block in report.blockwise["blocks"]), "the test needs blocks that follow the teacher"
    assert_nothing_helped(report)
    assert equal(model, came_in)


def test_blocks_that_harm_are_undone_after_steps_too(call, came_in, hostile):
    model, report = call(hostile, **RUINOUS, **BLOCKS, kl=1)
    assert_nothing_helped(report)
    assert equal(model, came_in)


def test_blocks_are_kept_where_the_steps_after_them_harm(call, came_in, judge, teacher, tmp_path):
    shared = {key: FAST[key] for key in ("block", "validation_fraction") if key in FAST}
    only, alone = call(teacher, **shared, steps=0, **BLOCKS)
    assert (alone.helped, alone.kept) == (True, "blocks")
    model, report = call(teacher, **RUINOUS, **BLOCKS, kl=1, out=tmp_path / "out")
    assert (report.helped, report.kept, report.step) == (True, "blocks", 0)
    assert equal(model, only)
    assert equal(tensorfold.load(tmp_path / "out"), only)
    assert judge(model) == pytest.approx(report.validation_loss, rel=1e-5)


def test_what_rounding_takes_away_again_did_not_help(call, came_in):
    tiny_steps = {**FAST, "lr": 3e-8}  # far below the distance of two numbers of bfloat16
    assert call(**tiny_steps)[1].helped  # in float32
    model, report = call(**tiny_steps, dtype=torch.bfloat16)
    assert_nothing_helped(report)
    assert equal(model, came_in)


def test_a_gain_that_survives_rounding_is_the_one_reported(call, judge):
    model, report = call(**{**FAST, "lr": 5e-3}, dtype=torch.bfloat16)
    assert report.helped
    assert model.dtype == torch.bfloat16
    assert judge(model) == pytest.approx(report.validation_loss, rel=1e-5)


def test_patience_counts_from_what_came_in(call):
    _, report = call(**{**RUINOUS, "steps": 40}, patience=2)
    assert_nothing_helped(report)
    assert report.steps == 4


def test_an_interrupted_run_gives_what_came_in_too(call, came_in, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("tensorfold.healing.heal.write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            call(**RUINOUS, out=tmp_path / "out")
    assert (tmp_path / "out.heal" / "checkpoint-6").exists()
    model, report = call(**RUINOUS, out=tmp_path / "out")
    assert_nothing_helped(report)
    assert equal(model, came_in)
    again, same = call(**RUINOUS, out=tmp_path / "out")
    assert same == report
    assert equal(again, came_in)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_run_that_fails_leaves_the_model_as_it_was(folded_directory, tokenizer, text_file, dtype):
    model = tensorfold.load(folded_directory).to(dtype)
    if dtype == torch.float64:
        with torch.no_grad():
            model.model.norm.weight += 1e-12
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TensorfoldError, match="the loss is"):
        heal(model, text_file, tokenizer=tokenizer, **{**FAST, "steps": 20, "lr": 1e30})
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) and after[name].dtype == dtype for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_memory_that_runs_out_is_no_bad_input(
    folded_directory, dense_directory, text_file, tmp_path, monkeypatch, command
):
    options = ["--train", text_file, "--teacher", dense_directory, "--steps", 1, "--batch", 4, "--block", 16]
    out_of_memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def fail(*_, **__):
        raise out_of_memory

    for place, more in {
        "tensorfold.healing.losses.HealLoss.__call__": [],
        "tensorfold.healing.losses.HealLoss._give_attention": ["--set", "attention=1"],
        "tensorfold.healing.run.HealTrainer.__init__": [],
        "tensorfold.healing.trainer.save_file": [],
        "tensorfold.healing.start.save_file": [],
        "tensorfold.healing.blockwise.relative_loss": ["--blockwise-tokens", 200],
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(place, fail)
            outcome = command("heal", folded_directory, *options, *more, "--out", tmp_path / "out")
        assert outcome.status == 1, place
        for word in ("memory", "--micro-batch", "--block", "blockwise_batch", "--blockwise-tokens"):
            assert word in outcome.err, place
    assert command("heal", folded_directory, *options, "--out", tmp_path / "out").status == 0


def test_every_tensor_keeps_its_precision(folded_directory, tokenizer, text_file):
    model = tensorfold.load(folded_directory, dtype=torch.bfloat16)
    model.model.norm.float()
    dtypes = {name: tensor.dtype for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    model.model.layers[0].train()
    modes = [module.training for module in model.modules()]
    heal(model, text_file, tokenizer=tokenizer, **GENTLE)
    assert {n: t.dtype for n, t in [*model.named_parameters(), *model.named_buffers()]} == dtypes
    assert [module.training for module in model.modules()] == modes


def test_the_command_says_that_nothing_helped(command, folded_directory, text_file, tmp_path):
    options = ["--steps", 2, "--batch", 4, "--block", 16, "--lr", 1.0, "--set", "validation_fraction=0.1"]
    call = ["heal", folded_directory, "--train", text_file, *options, "--set", "schedule=constant"]
    plain = command(*call, "--out", tmp_path / "a")
    assert plain.status == 0
    assert plain.out.startswith("nothing helped: the model is as it came in")
    result = json.loads(command(*call, "--out", tmp_path / "b", "--json").out)
    assert (result["helped"], result["kept"], result["step"]) == (False, "start", 0)


def test_the_log_is_quiet_where_healing_helped(call, caplog):
    with caplog.at_level(logging.WARNING, logger="tensorfold"):
        call(**GENTLE)
    assert not caplog.records
