"""Folding on several ranks: the bytes of one process, work for everybody, and no rank left waiting."""

import dataclasses
import errno
import json
import logging
import os
import random
import shutil
import socket
import subprocess
import sys
from multiprocessing import get_context

import pytest
import torch
import yaml

import tensorfold
from tensorfold import Auto, LowRank, SpecError
from tensorfold.cli.main import run
from tensorfold.folding import grouped
from tensorfold.folding import rank_search as search
from tensorfold.methods import auto
from tensorfold.utils.distributed import Ranks, schedule

pytestmark = pytest.mark.forks

ENTRIES = [
    {"targets": "embedding", "method": "low-rank", "rank": 8},
    {"targets": "mlp", "method": "kronecker", "keep": 0.5, "permute": "hidden", "scalars": True},
    {"targets": ["o_proj"], "method": "kronecker", "factor": [8, 8], "permute": "all"},
    {"targets": "attention", "method": "low-rank", "keep": 0.5},
]


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "own.yaml"
    path.write_text(yaml.safe_dump({"fold": ENTRIES}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def fold_arguments(dense_directory, recipe_file, text_file):
    model, text = ["fold", str(dense_directory), "--json"], ["--calibrate", str(text_file), "--tokens", "256"]
    recipe = [*model, "--recipe", str(recipe_file)]
    untied = [*model, "--keep", "0.5", "--targets", "embedding,lm_head,all-linear", "--untie", *text]
    graded = recipe_file.with_name("graded.yaml")
    rules = [{"targets": "embedding", "method": "graded", "keep": 0.4}, *ENTRIES[1:]]
    graded.write_text(yaml.safe_dump({"fold": rules}), encoding="utf-8")
    tied = [*model, "--recipe", str(graded), *text]
    tokens = recipe_file.with_name("tokens.yaml")
    rules = [{"targets": "embedding", "method": "token-mps", "rank": 2}, *ENTRIES[1:]]
    tokens.write_text(yaml.safe_dump({"fold": rules}), encoding="utf-8")
    mps = [*model, "--recipe", str(tokens), *text]
    return {"token-mps": mps, "data-free": recipe, "calibrated": [*recipe, *text], "untied": untied, "graded": tied}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def as_rank(work, rank, count, port, logs):
    """Run ``work`` as the process that ``torchrun`` would have started."""
    from accelerate.state import AcceleratorState

    os.environ.update(WORLD_SIZE=str(count), RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    AcceleratorState._reset_state(reset_partial_state=True)
    sys.stdout, sys.stderr = ((logs / f"{name}-{rank}").open("w") for name in ("out", "err"))
    log = logging.getLogger("tensorfold.folding.in_memory")
    log.setLevel(logging.DEBUG)
    log.addHandler(logging.FileHandler(logs / f"log-{rank}"))
    work(rank)


@pytest.fixture
def on_ranks(tmp_path):
    """``on_ranks(count, work)``: exit status, standard output and standard error of each rank, and what it logged."""

    def start(count, work):
        logs = tmp_path / f"logs-{count}"
        logs.mkdir()
        port = free_port()
        arguments = [(work, rank, count, port, logs) for rank in range(count)]
        processes = [get_context("fork").Process(target=as_rank, args=one) for one in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
        hanging = [process for process in processes if process.is_alive()]
        for process in hanging:
            process.kill()
        assert not hanging
        return [
            (process.exitcode, *((logs / f"{name}-{rank}").read_text() for name in ("out", "err", "log")))
            for rank, process in enumerate(processes)
        ]

    return start


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize("kind", ["data-free", "calibrated", "untied", "graded", "token-mps"])
def test_the_files_do_not_depend_on_the_number_of_ranks(kind, fold_arguments, on_ranks, command, tmp_path):
    assert command(*fold_arguments[kind], "--out", tmp_path / "plain").status == 0
    assert not torch.distributed.is_initialized()
    expected = contents(tmp_path / "plain")
    assert {"config.json", "README.md", "tensorfold.json", "model.safetensors"} <= expected.keys()
    modules = json.loads(expected["tensorfold.json"])["modules"]
    for count in (1, 2, 3):
        out = tmp_path / f"on-{count}"
        outcomes = on_ranks(count, lambda _, out=out: run([*fold_arguments[kind], "--out", str(out)]))
        assert [status for status, *_ in outcomes] == [0] * count, outcomes
        assert contents(out) == expected
        assert json.loads(outcomes[0][1])["modules"] == modules
        assert [printed for _, printed, *_ in outcomes[1:]] == [""] * (count - 1)
        solved = [
            [name for name in modules if f"rank {rank} of {count}: {name}\n" in log]
            for rank, (*_, log) in enumerate(outcomes)
        ]
        assert all(solved)
        if kind == "token-mps":  # every rank has solved its share of the table
            assert all(names.pop(0) == "model.embed_tokens" for names in solved)
            solved.append(["model.embed_tokens"])
        assert sorted(name for names in solved for name in names) == sorted(modules)


def test_block_by_block_on_two_ranks(dense_directory, text_file, on_ranks, command, tmp_path):
    fold = ["fold", str(dense_directory), "--keep", "0.6", "--tokens", "256", "--calibrate", str(text_file), "--out"]
    assert command(*fold, tmp_path / "memory").status == 0
    out = tmp_path / "two"
    outcomes = on_ranks(2, lambda _: run([*fold, str(out), "--low-memory"]))
    assert [status for status, *_ in outcomes] == [0, 0], outcomes
    assert contents(out) == contents(tmp_path / "memory")
    assert not out.with_name("two.fold").exists()
    names = json.loads((out / "tensorfold.json").read_text())["modules"]
    solved = [{n for n in names if f"rank {rank} of 2: {n}\n" in log} for rank, (*_, log) in enumerate(outcomes)]
    assert all(solved)
    assert solved[0] | solved[1] == set(names)


def test_torchrun(fold_arguments, command, tmp_path):
    assert command(*fold_arguments["calibrated"], "--out", tmp_path / "plain").status == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    done = subprocess.run(
        [*launch, "-m", "tensorfold", *fold_arguments["calibrated"], "--out", str(tmp_path / "two")],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout)["out"] == str(tmp_path / "two")
    assert contents(tmp_path / "two") == contents(tmp_path / "plain")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "two"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs 127.0.0.2, which Linux alone answers to")
@pytest.mark.parametrize("way", ["in memory", "block by block"])
def test_two_nodes(way, dense_directory, text_file, command, tmp_path):
    """Two agents of torchrun on two addresses, each with files of its own: nothing but messages goes between them."""
    options = ["--keep", "0.6", "--targets", "all-linear", "--tokens", "256", "--json"]
    options += ["--low-memory"] if way == "block by block" else []
    assert command("fold", dense_directory, "--calibrate", text_file, *options, "--out", tmp_path / "alone").status == 0
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "fold"]
    places, nodes = [tmp_path / "node-1", tmp_path / "node-2"], []
    for number, place in enumerate(places, start=1):
        shutil.copytree(dense_directory, place / "dense")
        shutil.copy(text_file, place)
        launch = ["--nnodes", "2", "--nproc-per-node", "1", *meeting, "--local-addr", f"127.0.0.{number}"]
        arguments = ["fold", "dense", "--calibrate", text_file.name, *options, "--out", "out"]
        own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TENSORFOLD_CACHE": str(place / "cache")}
        process = [sys.executable, "-m", "torch.distributed.run", *launch, "-m", "tensorfold", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        nodes.append(subprocess.Popen(process, cwd=place, env={**os.environ, **own}, **pipes))
    printed = [node.communicate(timeout=600) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed
    [written] = [place / "out" for place in places if (place / "out").exists()]  # the first rank's, on whichever node
    assert contents(written) == contents(tmp_path / "alone")
    assert sorted(bool(out) for out, _ in printed) == [False, True]


def refuses(matrix_rank, failure):
    """A command whose solver fails on one rank, from its second matrix on."""

    def patched(rank, arguments):
        solve, calls = LowRank.solve, []

        def failing(self, weight, spec, *data):
            calls.append(spec)
            if len(calls) > 1:
                raise failure
            return solve(self, weight, spec, *data)

        if rank == matrix_rank:
            LowRank.solve = failing
        run(arguments)

    return patched


class UnsendableError(Exception):
    def __reduce__(self):
        raise TypeError("cannot be pickled")


@pytest.mark.parametrize("kind", ["data-free", "calibrated"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_on_one_rank_is_everyones(kind, rank, fold_arguments, on_ranks, tmp_path):
    work, arguments = refuses(rank, SpecError("no such bond")), [*fold_arguments[kind], "--out", str(tmp_path / "out")]
    outcomes = on_ranks(2, lambda index: work(index, arguments))
    assert [status for status, *_ in outcomes] == [2, 2], outcomes
    assert outcomes[0][1:3] == outcomes[1][1:3]
    assert outcomes[0][2].startswith("tensorfold: model.")
    assert outcomes[0][2].endswith(": no such bond\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs-2"]


def test_a_failure_that_cannot_be_sent_is_everyones(fold_arguments, on_ranks, tmp_path):
    work, arguments = (
        refuses(1, UnsendableError("what it says")),
        [*fold_arguments["data-free"], "--out", str(tmp_path / "o")],
    )
    outcomes = on_ranks(2, lambda index: work(index, arguments))
    assert [status for status, *_ in outcomes] == [1, 1], outcomes
    assert all("UnsendableError: what it says" in said for _, _, said, _ in outcomes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs-2"]


def test_a_full_disk_under_the_first_rank_is_everyones(fold_arguments, on_ranks, tmp_path):
    from transformers import PreTrainedModel

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def work(rank):
        if rank == 0:
            PreTrainedModel.save_pretrained = full
        run([*fold_arguments["data-free"], "--out", str(tmp_path / "out")])

    outcomes = on_ranks(2, work)
    assert [status for status, *_ in outcomes] == [2, 2], outcomes
    assert all("disk is full" in said for _, _, said, _ in outcomes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs-2"]


def test_every_rank_has_the_folded_model(tiny, on_ranks, tmp_path):
    recipe = tensorfold.Recipe.from_dict({"fold": ENTRIES})

    def work(rank):
        model = tiny("llama").to(torch.bfloat16)
        report = tensorfold.fold(model, recipe)
        torch.save((model.state_dict(), report.errors), tmp_path / f"rank-{rank}")

    assert [status for status, *_ in on_ranks(2, work)] == [0, 0]
    alone = tiny("llama").to(torch.bfloat16)
    expected = tensorfold.fold(alone, recipe)
    for rank in range(2):
        state, errors = torch.load(tmp_path / f"rank-{rank}")
        assert errors == expected.errors
        assert state.keys() == alone.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in alone.state_dict().items())


@pytest.mark.parametrize("effort", ["medium", "high"])
def test_ranks_that_measure_differently_take_the_choices_of_the_first(
    effort, tiny, tokenizer, prose, on_ranks, tmp_path, monkeypatch
):
    """Rank 1 finds other curves, and shapes with other cores."""
    # Fewer hidden units would be better still.
    monkeypatch.setitem(auto.EFFORTS, effort, dataclasses.replace(auto.EFFORTS[effort], units=False))

    def folded():
        model = tiny("llama", intermediate_size=96)
        for block in model.model.layers:  # groups of columns with one basis, which high effort finds
            generator = torch.Generator().manual_seed(3)
            basis, mix = torch.randn(3, 24, generator=generator), torch.randn(32, 4, 3, generator=generator)
            block.mlp.down_proj.weight.data = torch.einsum("ogk,kn->ogn", mix, basis).reshape(32, 96) * 0.1
        report = tensorfold.fold(model, Auto(keep=0.3, effort=effort), tokenizer, [prose], calibration_tokens=256)
        return model.state_dict(), report.choices

    def work(rank):
        if rank == 1:
            curve, fit = search.error_curve, grouped.fit_shared_basis
            search.error_curve = lambda weight, *metrics: curve(weight, *metrics) * (1 + weight[0, 0].abs() * 100)
            grouped.fit_shared_basis = lambda *given, **options: fit(*given, **{**options, "rounds": 1})
        torch.save(folded(), tmp_path / f"rank-{rank}")

    assert [status for status, *_ in on_ranks(2, work)] == [0, 0]
    expected, choices = folded()
    assert any(choice.groups > 1 for choice in choices.values()) == (effort == "high")
    for rank in range(2):
        state, found = torch.load(tmp_path / f"rank-{rank}", weights_only=False)
        assert found == choices
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("what", ["model.layers.1.mlp.up_proj.weight", "recipe", "untie", "calibration text"])
def test_ranks_that_were_given_different_things_are_refused(what, tiny, tokenizer, prose, on_ranks, tmp_path):
    def work(rank):
        model, text, keep, untie = tiny("llama"), prose, 0.5, rank == 1 and what == "untie"
        if rank == 1 and what == "recipe":
            keep = 0.6
        elif rank == 1 and what == "calibration text":
            text = prose.replace("fox", "cat")
        elif rank == 1 and not untie:
            model.get_parameter(what).data[3, 4] += 1e-3
        recipe = tensorfold.Recipe((tensorfold.Rule("mlp", LowRank(keep=keep)),), untie=untie)
        different = "recipe" if what == "untie" else what
        with pytest.raises(tensorfold.InputError, match=f"fold: {different} of rank 1 is not that of rank 0"):
            tensorfold.fold(model, recipe, tokenizer, [text], calibration_tokens=256)
        (tmp_path / f"refused-{rank}").touch()

    assert [status for status, *_ in on_ranks(2, work)] == [0, 0]
    assert {"refused-0", "refused-1"} <= {path.name for path in tmp_path.iterdir()}


def test_a_failure_between_two_meetings_does_not_upset_the_next_block(on_ranks):
    """Each rank fails by itself while the other goes on, then both fail, then neither."""

    def meet_twice(ranks, failing):
        with ranks.together(), ranks.together():
            ranks.gather("first")
            if ranks.index in failing:
                raise ValueError(f"rank {ranks.index}")
            ranks.gather("second")

    def work(_):
        ranks = Ranks.find(cpu=True)
        for failing in ([0], [1], [0, 1]):
            with pytest.raises(ValueError, match=f"rank {failing[0]}"):
                meet_twice(ranks, failing)
        meet_twice(ranks, [])

    assert [status for status, *_ in on_ranks(2, work)] == [0, 0]


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_schedule_gives_everything_to_one_rank_and_as_much_to_each(ranks):
    draw = random.Random(ranks)
    for size in (0, 1, 5, 40):
        costs = [draw.choice([1, 2, 3, 12, 40]) for _ in range(size)]
        turns = schedule(costs, ranks)
        assert sorted(k for turn in turns for part in turn for k in part) == list(range(size))
        assert all(len(turn) == ranks for turn in turns)
        loads = [sum(costs[k] for turn in turns for k in turn[rank]) for rank in range(ranks)]
        assert max(loads) - min(loads) <= max(costs, default=0)
        for turn in turns:
            dearest = max(costs[k] for part in turn for k in part)
            assert all(sum(costs[k] for k in part) <= dearest for part in turn)


def test_small_matrices_share_the_turn_of_a_large_one():
    assert schedule([1, 6, 1, 6, 2, 6, 2], 2) == [[[1], [3]], [[5], [4, 6, 0, 2]]]


def test_one_rank_takes_everything_in_order():
    assert schedule([1, 3, 2], 1) == [[[0]], [[1]], [[2]]]
