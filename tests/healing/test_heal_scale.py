"""Two gloo processes against one, with the configuration files that are shipped for accelerate."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

import tensorfold
from tensorfold.errors import InputError
from tensorfold.healing.heal import heal

pytestmark = pytest.mark.forks

EXAMPLES = Path(__file__).parents[2] / "examples" / "accelerate"
SETTINGS = {
    "steps": 20, "batch": 8, "micro_batch": 2, "block": 32, "lr": 2e-3, "validation_fraction": 0.1, "kl": 0.5,
    "save_every": 10, "evaluate_every": 10,
}  # fmt: skip


def environment(file):
    """The environment that ``accelerate launch --config_file`` sets for its processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        given = launch_command_parser().parse_args(["--config_file", str(EXAMPLES / file), "script.py"])
        arguments, _, _ = _validate_launch_command(given)
        assert arguments.num_processes == 2
        wanted = prepare_multi_gpu_env(arguments)
    return {k: v for k, v in wanted.items() if k.startswith(("ACCELERATE", "FSDP"))}


def work(rank, port, variables, student, teacher, text, out, settings):
    from accelerate.state import AcceleratorState

    os.environ.update(variables)
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    AcceleratorState._reset_state(reset_partial_state=True)
    heal(tensorfold.load(student), text, tensorfold.load(teacher), out=out, **settings)


def start(file, student, teacher, text, out, settings=SETTINGS):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (port, environment(file), student, teacher, text, out, settings)
    processes = [get_context("fork").Process(target=work, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    return processes


def finish(processes):
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]


def losses(directory):
    records = [json.loads(line) for line in (directory / "heal.jsonl").read_text().splitlines()]
    return {(r["step"], key): r[key] for r in records for key in ("loss", "kl", "validation_loss") if key in r}


@pytest.fixture(scope="module")
def alone(folded_directory, dense_directory, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "out"
    heal(tensorfold.load(folded_directory), text_file, tensorfold.load(dense_directory), out=out, **SETTINGS)
    return out


def assert_equal_to(alone, out):
    expected = losses(alone)
    assert sum(key == "loss" for _, key in expected) == 20
    assert losses(out) == pytest.approx(expected, abs=1e-4)
    ours, theirs = tensorfold.load(out).state_dict(), tensorfold.load(alone).state_dict()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-3)


@pytest.mark.parametrize("file", ["ddp-cpu2.yaml", "fsdp2.yaml"])
def test_two_processes_are_one(file, folded_directory, dense_directory, text_file, tmp_path, alone):
    finish(start(file, folded_directory, dense_directory, text_file, tmp_path / "out"))
    assert_equal_to(alone, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_killed_shards_go_on(folded_directory, dense_directory, text_file, tmp_path, alone):
    out, directory = tmp_path / "out", tmp_path / "out.heal"
    processes = start("fsdp2.yaml", folded_directory, dense_directory, text_file, out)
    deadline = time.monotonic() + 60
    while not (directory / "checkpoint-10").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    for sent in (
        signal.SIGSTOP,
        signal.SIGKILL,
    ):  # both are stopped first, so that neither sees the other's end and fails by itself
        for process in processes:
            os.kill(process.pid, sent)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL] * 2
    assert any(path.name.startswith("pytorch_model_fsdp") for path in (directory / "checkpoint-10").iterdir())
    with pytest.raises(InputError, match="2 processes then, 1 now"):
        heal(tensorfold.load(folded_directory), text_file, tensorfold.load(dense_directory), out=out, **SETTINGS)
    finish(start("fsdp2.yaml", folded_directory, dense_directory, text_file, out))
    assert_equal_to(alone, out)


def test_shards_give_the_best_step_back(folded_directory, dense_directory, text_file, tmp_path):
    settings = {**SETTINGS, "steps": 15, "lr": 0.5, "warmup": 10, "schedule": "constant", "train": "cores"}
    settings |= {"evaluate_every": 3, "kl": 0.0, "cross_entropy": 1.0, "ffn": 0.1, "embedding": 0.1, "attention": 0.1}
    finish(start("fsdp2.yaml", folded_directory, dense_directory, text_file, tmp_path / "two", settings))
    heal(
        tensorfold.load(folded_directory), text_file, tensorfold.load(dense_directory), out=tmp_path / "one", **settings
    )
    one, two = (json.loads((tmp_path / name / "tensorfold.json").read_text())["heal"] for name in ("one", "two"))
    assert two["step"] == one["step"] < 15, "the test needs a run that gets worse in the end"
    ours, theirs = tensorfold.load(tmp_path / "two").state_dict(), tensorfold.load(tmp_path / "one").state_dict()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-3)


@pytest.mark.parametrize("file", ["ddp-cpu2.yaml", "fsdp2.yaml"])
def test_steps_that_only_harm_are_undone(file, folded_directory, dense_directory, text_file, tmp_path):
    settings = {**SETTINGS, "steps": 2, "lr": 1.0, "schedule": "constant", "evaluate_every": 1, "kl": 0.0}
    finish(start(file, folded_directory, dense_directory, text_file, tmp_path / "out", settings))
    report = json.loads((tmp_path / "out" / "tensorfold.json").read_text())["heal"]
    assert (report["helped"], report["kept"], report["step"], report["steps"]) == (False, "start", 0, 2)
    ours, theirs = tensorfold.load(tmp_path / "out").state_dict(), tensorfold.load(folded_directory).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.slow
def test_accelerate_launch(folded_directory, text_file, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(EXAMPLES / "ddp-cpu2.yaml")]
    options = ["--train", str(text_file), "--steps", "2", "--batch", "4", "--block", "16", "--out", str(tmp_path / "o")]
    done = subprocess.run(
        [*command, "-m", "tensorfold", "heal", str(folded_directory), *options, "--json"],
        capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2
    run = json.loads((tmp_path / "o" / "tensorfold.json").read_text())
    assert run["heal"]["tokens"] == 2 * 4 * 16
