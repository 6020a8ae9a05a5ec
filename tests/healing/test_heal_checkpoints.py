"""Runs that are killed, have a full disk or damaged checkpoints, or are resumed with other settings."""

import errno
import json
import os
import shutil
import signal
import time
from multiprocessing import get_context

import pytest
import torch

import tensorfold
from tensorfold.errors import InputError, TensorfoldError
from tensorfold.healing import checkpoints
from tensorfold.healing.heal import heal
from tensorfold.healing.log import Reporter, StepLog
from tensorfold.hf.loading import save

pytestmark = pytest.mark.forks

SETTINGS = {"steps": 24, "batch": 4, "block": 32, "lr": 3e-3, "validation_fraction": 0.1, "save_every": 4}


class StoppedError(Exception):
    """An end of a run in this process, in place of a kill."""


@pytest.fixture(scope="module")
def folded_gpt2(tiny, tokenizer, tmp_path_factory):
    """The directory of a folded GPT-2, which has dropout, so that the random state matters."""
    model = tiny("gpt2")
    report = tensorfold.fold(model, tensorfold.LowRank(keep=0.5))
    path = tmp_path_factory.mktemp("gpt2") / "folded"
    save(model, tokenizer, path, {"base_model": "gpt2", **report.to_dict()})
    return path


@pytest.fixture(scope="module")
def uninterrupted(folded_gpt2, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    heal(tensorfold.load(folded_gpt2), text_file, out=out, **SETTINGS)
    return out


@pytest.fixture
def stop_at(monkeypatch):
    """``stop_at(step)``: healing in this process ends there with StoppedError; ``stop_at(None)`` lets it run."""
    original = Reporter.on_log

    def stop(step):
        def on_log(self, args, state, control, logs=None, **rest):
            original(self, args, state, control, logs, **rest)
            if state.global_step == step:
                raise StoppedError

        monkeypatch.setattr(Reporter, "on_log", original if step is None else on_log)

    return stop


def log_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(records):
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in records]


def assert_same_result(out, expected):
    ours, theirs = tensorfold.load(out).state_dict(), tensorfold.load(expected).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert without_times(log_of(out / "heal.jsonl")) == without_times(log_of(expected / "heal.jsonl"))


def kill_at(folded, text, out, lines):
    """Heal in a process of its own, and SIGKILL it once its log has so many lines."""
    process = get_context("fork").Process(
        target=heal, args=(tensorfold.load(folded), text), kwargs={"out": out, **SETTINGS}
    )
    process.start()
    log = out.with_name(f"{out.name}.heal") / "log.jsonl"
    deadline = time.monotonic() + 60
    while process.is_alive() and time.monotonic() < deadline:
        if log.exists() and log.read_bytes().count(b"\n") >= lines:
            process.kill()
            break
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_killed_twice_it_ends_as_if_nothing_had_been(folded_gpt2, text_file, tmp_path, uninterrupted):
    out, work = tmp_path / "out", tmp_path / "out.heal"
    kill_at(folded_gpt2, text_file, out, 7)
    kill_at(folded_gpt2, text_file, out, 19)
    assert not out.exists()
    kept = sorted(int(path.name[11:]) for path in work.glob("checkpoint-*"))
    assert 0 < len(kept) <= 4
    assert kept[-1] >= 4
    heal(tensorfold.load(folded_gpt2), text_file, out=out, **SETTINGS)
    assert_same_result(out, uninterrupted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_damaged_checkpoint_is_passed_over(folded_gpt2, text_file, tmp_path, uninterrupted, stop_at, caplog, file):
    out, work = tmp_path / "out", tmp_path / "out.heal"
    stop_at(14)
    with pytest.raises(StoppedError):
        heal(tensorfold.load(folded_gpt2), text_file, out=out, **SETTINGS)
    newest = checkpoints.newest(work)
    content = bytearray((newest / file).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / file).write_bytes(content)
    before = checkpoints.newest(work)
    assert before.name < newest.name
    caplog.clear()
    stop_at(None)
    heal(tensorfold.load(folded_gpt2), text_file, out=out, **SETTINGS)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{newest} is damaged (the checksum of {file} differs)" in caplog.text
    assert_same_result(out, uninterrupted)


def test_a_run_that_was_over_before_it_was_killed(folded_gpt2, text_file, tmp_path, uninterrupted, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("tensorfold.healing.heal.write", lambda *_: (_ for _ in ()).throw(StoppedError))
        with pytest.raises(StoppedError):
            heal(tensorfold.load(folded_gpt2), text_file, out=out, **SETTINGS)
    report = heal(tensorfold.load(folded_gpt2), text_file, out=out, **SETTINGS)
    assert report.steps == 24
    assert_same_result(out, uninterrupted)
    model = tensorfold.load(folded_gpt2)
    assert heal(model, text_file, out=out, **SETTINGS) == report
    assert torch.equal(model.state_dict()["lm_head.weight"], tensorfold.load(out).state_dict()["lm_head.weight"])


def test_a_run_that_patience_had_ended_stays_ended(folded_gpt2, text_file, tmp_path, monkeypatch):
    settings = {**SETTINGS, "lr": 0.5, "schedule": "constant", "evaluate_every": 1, "patience": 2}
    whole = heal(tensorfold.load(folded_gpt2), text_file, out=tmp_path / "whole", **settings)
    assert whole.steps < 24
    with monkeypatch.context() as patch:
        patch.setattr("tensorfold.healing.heal.write", lambda *_: (_ for _ in ()).throw(StoppedError))
        with pytest.raises(StoppedError):
            heal(tensorfold.load(folded_gpt2), text_file, out=tmp_path / "out", **settings)
    assert heal(tensorfold.load(folded_gpt2), text_file, out=tmp_path / "out", **settings).steps == whole.steps
    assert_same_result(tmp_path / "out", tmp_path / "whole")


def test_going_on_otherwise_is_refused(folded_gpt2, folded_directory, text_file, tmp_path, stop_at):
    text = tmp_path / "text.txt"
    shutil.copy(text_file, text)
    out = tmp_path / "out"
    stop_at(6)
    with pytest.raises(StoppedError):
        heal(tensorfold.load(folded_gpt2), text, out=out, **SETTINGS)
    before = sorted((tmp_path / "out.heal").rglob("*"))

    def refused(message, model=None, **changed):
        with pytest.raises(InputError, match=message):
            heal(tensorfold.load(model or folded_gpt2), text, out=out, **{**SETTINGS, **changed})

    refused(r"other settings or inputs: lr=0\.003 then, 0\.1 now; steps=24 then, 9 now\. Use those",
            lr=0.1, steps=9)  # fmt: skip
    refused("the model to heal changed since", model=folded_directory)
    run = json.loads((tmp_path / "out.heal" / "run.json").read_text())
    with pytest.raises(InputError, match="1 processes then, 2 now"):
        checkpoints.begin(tmp_path / "out.heal", {**run, "processes": 2}, write=True)
    text.write_text(text.read_text() + "One more line.")
    refused("the text or its tokenizer changed since")
    assert sorted((tmp_path / "out.heal").rglob("*")) == before


def test_a_full_disk_leaves_the_earlier_checkpoints(folded_gpt2, text_file, tmp_path, uninterrupted, monkeypatch):
    out, work = tmp_path / "out", tmp_path / "out.heal"
    torch_save = torch.save

    def full(thing, path, *rest, **options):
        if "checkpoint-8" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return torch_save(thing, path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(TensorfoldError, match="disk is full"):
            heal(tensorfold.load(folded_gpt2), text_file, out=out, **SETTINGS)
    names = sorted(path.name for path in work.glob("*checkpoint-*"))
    assert checkpoints.newest(work).name == names[-1] != "checkpoint-8"
    heal(tensorfold.load(folded_gpt2), text_file, out=out, **SETTINGS)
    assert_same_result(out, uninterrupted)


def test_a_teacher_that_vanished(folded_directory, dense_directory, text_file, tmp_path, stop_at):
    dense = tmp_path / "dense"
    shutil.copytree(dense_directory, dense)
    stop_at(6)
    with pytest.raises(StoppedError):
        heal(tensorfold.load(folded_directory), text_file, str(dense), out=tmp_path / "out", **SETTINGS)
    shutil.rmtree(dense)
    stop_at(None)
    with pytest.raises(InputError, match=r"dense.*no such directory"):
        heal(tensorfold.load(folded_directory), text_file, str(dense), out=tmp_path / "out", **SETTINGS)
    assert checkpoints.newest(tmp_path / "out.heal") is not None


def test_rotation_keeps_two_and_the_best_of_each(tmp_path):
    def make(step, best):
        with checkpoints.sealed(tmp_path / f"checkpoint-{step}") as partial:
            (partial / "trainer_state.json").write_text(json.dumps({"best_global_step": best}))
        checkpoints.rotate(tmp_path, step)
        return sorted(int(path.name[11:]) for path in tmp_path.iterdir())

    assert make(5, None) == [5]
    assert make(10, 5) == [5, 10]
    assert make(15, 5) == [5, 10, 15]
    assert make(20, 20) == [5, 15, 20]
    assert make(100, 20) == [20, 100]
    assert make(30, 30) == [20, 30], "100 steps were not reached by this run"


def test_a_seal_shows_every_change(tmp_path):
    target = tmp_path / "checkpoint-1"
    with checkpoints.sealed(target) as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "a").write_text("a")
    assert checkpoints.damage(target) is None
    (target / "deep" / "a").write_text("b")
    assert checkpoints.damage(target) == "the checksum of deep/a differs"
    (target / "deep" / "a").unlink()
    assert "No such file" in checkpoints.damage(target)
    (target / "manifest.json").write_text("{")
    assert checkpoints.damage(target)
    assert checkpoints.newest(tmp_path) is None


def test_a_log_line_that_was_cut_short_is_written_again(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"stage": "blockwise", "block": 0, "step": 1}\n{"step": 1}\n{"step": 2}\n{"st')
    log = StepLog(path)
    assert [record["step"] for record in log.records] == [1, 1, 2]
    log.forget_after(1)
    log.write({"stage": "blockwise", "block": 0, "step": 1})
    log.write({"stage": "blockwise", "block": 1, "step": 1})
    log.write({"step": 2, "again": True})
    assert [record["step"] for record in log_of(path)] == [1, 1, 1, 2]
    assert log_of(path)[-1]["again"]


def test_a_fingerprint_shows_a_changed_weight_and_name(tiny):
    one, other = tiny("llama"), tiny("llama")
    assert checkpoints.fingerprint(one) == checkpoints.fingerprint(other)
    with torch.no_grad():
        other.model.norm.weight[0] += 1e-6
    assert checkpoints.fingerprint(one) != checkpoints.fingerprint(other)
