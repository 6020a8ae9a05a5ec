"""End-to-end healing against references written out here: loss, steps, trained parameters, kept weights."""

import dataclasses
import json
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F

import tensorfold
from tensorfold.data.token_cache import TokenCache
from tensorfold.errors import InputError, TensorfoldError
from tensorfold.healing.heal import heal
from tensorfold.healing.log import loss_plot
from tensorfold.healing.setup import choose_trained
from tensorfold.healing.trainer import HealTrainer
from tensorfold.nn import FoldedModule
from tensorfold.recipes.settings import HealSettings

FAST = {"steps": 3, "batch": 4, "block": 16, "lr": 1e-3, "validation_fraction": 0.1}


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def log_of(directory):
    return [json.loads(line) for line in (directory / "heal.jsonl").read_text().splitlines()]


def held_out_loss(model, text, tokenizer, block, fraction):
    windows = TokenCache.build(text, tokenizer, block, validation_fraction=fraction).validation
    with torch.no_grad():
        losses = [model(w["input_ids"][None], labels=w["input_ids"][None]).loss.item() for w in windows_of(windows)]
    return sum(losses) / len(losses)


def windows_of(dataset):
    return [dataset[index] for index in range(len(dataset))]


def test_steps_are_those_of_a_loop_written_by_hand(folded_directory, tokenizer, text_file):
    model, reference = tensorfold.load(folded_directory), tensorfold.load(folded_directory)
    heal(
        model, text_file, tokenizer=tokenizer, **FAST, micro_batch=2, schedule="linear", warmup=1, weight_decay=0.1,
        clip=0.5, seed=3,
    )  # fmt: skip
    windows = TokenCache.build(text_file, tokenizer, 16, validation_fraction=0.1).train
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(3))[:12].reshape(3, 4)
    matrices = [p for p in reference.parameters() if p.ndim > 1]
    vectors = [p for p in reference.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for rate, batch in zip([0, 1e-3, 0.5e-3], order, strict=True):
        ids = torch.stack([windows[int(index)]["input_ids"] for index in batch])
        logits = reference(ids).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    found, start = weights(model), weights(tensorfold.load(folded_directory))
    for name, expected in weights(reference).items():
        assert not torch.equal(found[name], start[name]), name
        torch.testing.assert_close(found[name], expected, rtol=0, atol=2e-5)


@pytest.fixture
def with_scalars(tiny):
    model = tiny("llama")
    tensorfold.fold(model, tensorfold.Kronecker(terms=2, factor=(24, 16), scalars=True))
    return model


@pytest.mark.parametrize("train", ["cores", "all", "all-but-embeddings"])
@pytest.mark.parametrize("freeze_scalars", [False, True])
def test_what_is_frozen_does_not_move(with_scalars, tokenizer, text_file, train, freeze_scalars):
    model, before = with_scalars, weights(with_scalars)
    inside = {
        f"{n}.{p}" for n, m in model.named_modules() if isinstance(m, FoldedModule) for p, _ in m.named_parameters()
    }
    heal(
        model, text_file, tokenizer=tokenizer, **{**FAST, "steps": 2}, train=train, freeze_scalars=freeze_scalars,
        schedule="constant",
    )  # fmt: skip
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    expected = {"cores": inside, "all": set(before), "all-but-embeddings": set(before) - {"model.embed_tokens.weight"}}
    scalars = {name for name in before if name.endswith("scalars")}
    assert scalars
    assert moved == expected[train] - (scalars if freeze_scalars else set())
    assert all(parameter.requires_grad for parameter in model.parameters()), "given back as it came"


def test_training_needs_something_to_train(teacher):
    with pytest.raises(InputError, match="no folded module"):
        choose_trained(teacher, HealSettings(train="cores"))


def test_the_best_step_by_validation_is_kept(folded_directory, tokenizer, text_file, tmp_path):
    out, rising = tmp_path / "out", {**FAST, "steps": 30, "lr": 0.6, "warmup": 30, "evaluate_every": 3}
    report = heal(tensorfold.load(folded_directory), text_file, tokenizer=tokenizer, out=out, **rising)
    validated = {r["step"]: r["validation_loss"] for r in log_of(out) if "validation_loss" in r}
    assert list(validated) == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30]
    best = min((loss, step) for step, loss in validated.items())
    assert (report.validation_loss, report.step) == best
    assert report.steps == 30 > report.step > 0, "the test needs a run that gets worse in the end"
    assert report.validation_loss_before == validated[0]
    kept = tensorfold.load(out)
    assert held_out_loss(kept, text_file, tokenizer, 16, 0.1) == pytest.approx(report.validation_loss, rel=1e-5)
    assert not (tmp_path / "out.heal").exists()
    last = tensorfold.load(folded_directory)
    report = heal(last, text_file, tokenizer=tokenizer, **rising, select="last")
    assert (report.step, report.validation_loss) == (30, validated[30])


def test_patience_ends_the_run(folded_directory, tokenizer, text_file, tmp_path):
    settings = {**FAST, "steps": 40, "lr": 0.5, "schedule": "constant", "evaluate_every": 2, "patience": 3}
    report = heal(tensorfold.load(folded_directory), text_file, tokenizer=tokenizer, out=tmp_path / "out", **settings)
    assert report.steps == report.step + 6 < 40
    assert max(r["step"] for r in log_of(tmp_path / "out")) == report.steps
    with pytest.raises(InputError, match="patience has no effect here; it needs validation_fraction above 0"):
        heal(
            tensorfold.load(folded_directory), text_file, tokenizer=tokenizer, **{**FAST, "validation_fraction": 0},
            patience=1,
        )  # fmt: skip


def test_the_log_has_every_step_with_its_terms(student, teacher, tokenizer, text_file, tmp_path):
    heal(student, text_file, teacher, tokenizer=tokenizer, out=tmp_path / "out", **FAST, ffn=0.5, kl=0.25)
    steps = [r for r in log_of(tmp_path / "out") if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3]
    assert [r["tokens"] for r in steps] == [64, 128, 192]
    for r in steps:
        assert r["loss"] == pytest.approx(r["cross_entropy"] + 0.25 * r["kl"] + 0.5 * r["ffn"], rel=1e-5)
        assert r["tokens_per_second"] == pytest.approx(64 / r["seconds"], rel=0.01)
    assert steps[0]["lr"] == 1e-3 > steps[1]["lr"] > steps[2]["lr"] > 0
    plot = (tmp_path / "out" / "loss.svg").read_text()
    assert len(plot.split('points="')[1].split('"')[0].split()) == 3
    assert plot.count("<circle") == 4


def test_the_plot_runs_from_corner_to_corner():
    plot = loss_plot([{"step": 0, "validation_loss": 5.0}, {"step": 1, "loss": 4.0}, {"step": 9, "loss": 2.0}])
    assert 'points="135.6,153.3 740.0,340.0"' in plot
    assert '<circle cx="60.0" cy="60.0"' in plot
    assert loss_plot([]).startswith("<svg")


def test_a_teacher_alone_means_distillation(student, teacher, tokenizer, text_file, tmp_path):
    heal(student, text_file, teacher, tokenizer=tokenizer, out=tmp_path / "out", **{**FAST, "steps": 1})
    card = json.loads((tmp_path / "out" / "tensorfold.json").read_text())
    assert card["heal"]["settings"]["kl"] == 1.0
    assert card["base_model"] == "dense"
    assert log_of(tmp_path / "out")[1]["kl"] > 0


def test_text_is_a_name_paths_or_documents(student, tokenizer, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Something else. " * 40)
    labels = [
        heal(student, text, tokenizer=tokenizer, **{**FAST, "steps": 1}).text
        for text in (str(text_file), text_file, [text_file, other], [text_file.read_text(), "More. " * 99])
    ]
    assert labels == ["prose.txt", "prose.txt", "prose.txt + other.txt", "2 documents"]
    for wrong in ([], [1], 3, [text_file, "mixed"]):
        with pytest.raises(InputError, match="needed a TEXT, a list of paths"):
            heal(student, wrong, tokenizer=tokenizer, **FAST)


def test_training_leaves_precision_mode_and_configuration(student, tokenizer, text_file):
    student.to(torch.bfloat16).train()
    student.config.use_cache = True
    heal(student, text_file, tokenizer=tokenizer, **FAST, precision="bf16", gradient_checkpointing=True)
    assert student.dtype == torch.bfloat16
    assert student.training
    assert student.config.use_cache
    assert student(torch.zeros(1, 2, dtype=torch.long)).logits.dtype == torch.bfloat16


def test_blocks_come_first(student, teacher, tokenizer, text_file, tmp_path):
    report = heal(
        student, text_file, teacher, tokenizer=tokenizer, out=tmp_path / "out", steps=0, block=16,
        validation_fraction=0.1, blockwise_tokens=400, blockwise_epochs=8,
    )  # fmt: skip
    assert report.step == report.steps == 0
    assert {r["block"] for r in log_of(tmp_path / "out")} == {0, 1}
    assert report.blockwise["tokens"] > 0
    kept = tensorfold.load(tmp_path / "out")
    assert all(torch.equal(p, q) for p, q in zip(kept.parameters(), student.parameters(), strict=True))
    assert held_out_loss(kept, text_file, tokenizer, 16, 0.1) == pytest.approx(report.validation_loss, rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"kl": 1}, "compare with a teacher, and none was given"),
        ({"cross_entropy": 0}, "every term of the loss has weight 0"),
        ({"steps": 0}, "leave nothing to do"),
        ({"block": 999}, "block=999; needed at most the 128 positions"),
        ({"batch": 4, "micro_batch": 3}, "batch=4 is not a multiple of micro_batch=3"),
        ({"learning_rate": 1}, "unknown key 'learning_rate'"),
        ({"report_to": "nothing-known"}, "the Trainer refuses these settings: .*nothing-known"),
    ],
)
def test_wrong_settings_are_refused(student, tokenizer, text_file, overrides, message):
    before = weights(student)
    with pytest.raises(InputError, match=message):
        heal(student, text_file, tokenizer=tokenizer, **{**FAST, **overrides})
    assert all(torch.equal(value, before[name]) for name, value in weights(student).items())


def test_divergence_is_an_error(student, tokenizer, text_file):
    with pytest.raises(TensorfoldError, match=r"the loss is (nan|inf) at step .* lower lr"):
        heal(student, text_file, tokenizer=tokenizer, **{**FAST, "steps": 20, "lr": 1e30}, schedule="constant")


def test_vectors_do_not_decay(with_scalars):
    decayed = HealTrainer.get_decay_parameter_names(None, with_scalars)
    assert "model.layers.0.mlp.up_proj.cores.0" in decayed
    assert not any("norm" in name or "scalars" in name for name in decayed)


def test_settings_survive_a_round_trip():
    assert HealSettings(**dataclasses.asdict(HealSettings(patience=2))) == HealSettings(patience=2)


class TestCommand:
    def options(self, text, **extra):
        pairs = {"--train": text, "--steps": 3, "--batch": 4, "--block": 16, "--lr": 1e-3, **extra}
        return [str(part) for pair in pairs.items() for part in pair]

    def test_writes_a_model_and_is_done_the_second_time(self, command, folded_directory, dense_directory, text_file):
        out = folded_directory.parent / "folded-healed"
        call = ["heal", folded_directory, *self.options(text_file), "--teacher", dense_directory, "--set", "ffn=0.5"]
        try:
            first = command(*call, "--json")
            assert first.status == 0, first.err
            result = json.loads(first.out)
            assert result["out"] == str(out)
            assert (result["steps"], result["tokens"]) == (3, 192)
            card = json.loads((out / "tensorfold.json").read_text())
            assert card["base_model"] == "dense"
            assert card["heal"]["validation_loss"] == result["validation_loss"] is not None
            assert card["heal"]["settings"]["ffn"] == 0.5
            healed = tensorfold.load(out)
            assert not torch.equal(healed.lm_head.cores[0], tensorfold.load(folded_directory).lm_head.cores[0])
            again = command(*call, "--json")
            assert json.loads(again.out) == result
            other = command(*call, "--seed-is-no-option")
            assert other.status == 2
            changed = command(*call, "--set", "seed=1")
            assert changed.status == 2
            assert "already exists" in changed.err
        finally:
            shutil.rmtree(out, ignore_errors=True)

    def test_stages_of_a_recipe_follow_one_another(self, command, folded_directory, text_file, tmp_path):
        recipe = tmp_path / "r.yaml"
        stage = "batch: 4, block: 16, validation_fraction: 0.1"
        recipe.write_text(
            "fold: [{targets: mlp, method: low-rank, keep: 0.5}]\n"
            f"heal:\n- {{text: {text_file}, steps: 2, lr: 1e-3, {stage}}}\n"
            f"- {{text: {text_file}, steps: 3, lr: 1e-4, {stage}}}\n"
        )
        outcome = command("heal", folded_directory, "--recipe", recipe, "--out", tmp_path / "out", "--json")
        assert outcome.status == 0, outcome.err
        first, last = (log_of(tmp_path / name) for name in ("out.stage-1", "out"))
        assert (len(first), len(last)) == (5, 7)
        assert last[0]["validation_loss"] == pytest.approx(first[-1]["validation_loss"], rel=1e-6)
        assert json.loads((tmp_path / "out" / "tensorfold.json").read_text())["heal"]["previous"]["steps"] == 2

    def test_wrong_use_is_refused(self, refused, folded_directory, text_file, tmp_path):
        refused("heal", folded_directory, says=["no text to train on"])
        refused("heal", folded_directory, "--train", text_file, "--set", "steps", says=["needed KEY=VALUE"])
        refused("heal", folded_directory, "--train", text_file, "--set", "lrr=1", says=["did you mean 'lr'"])
        gone = tmp_path / "gone"
        refused("heal", folded_directory, *self.options(text_file, **{"--teacher": gone}), says=[str(gone)])
        refused("heal", folded_directory, *self.options(tmp_path / "none.txt"), says=["no text"])
        full = tmp_path / "full"
        full.mkdir()
        (full / "thing").touch()
        refused("heal", folded_directory, *self.options(text_file, **{"--out": full}), says=["not empty"])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_tensorboard_that_is_missing_is_named(student, tokenizer, text_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(InputError, match=r"the Trainer refuses these settings: .*[Tt]ensor[Bb]oard"):
        heal(student, text_file, tokenizer=tokenizer, **FAST, report_to="tensorboard")
