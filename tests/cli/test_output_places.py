"""Places that outputs may be written to: odd names, links, and two processes at once."""

import os
import threading
from pathlib import Path

import pytest

from tensorfold.errors import InputError, TensorfoldError
from tensorfold.utils.atomic_files import check_place, is_disk_full
from tensorfold.utils.block_checkpoints import BlockCheckpoints
from tensorfold.utils.claims import claimed

HALF = ("--keep", "0.5")


@pytest.fixture
def commands(dense_directory, folded_directory, text_file):
    """Commands that write an output, without its name at the end."""
    return {
        "fold": ("fold", dense_directory, *HALF, "--calibrate", "none", "--out"),
        "calibrated": ("fold", dense_directory, *HALF, "--calibrate", text_file, "--tokens", "200", "--out"),
        "export": ("export", folded_directory, "--to", "dense", "--out"),
        "heal": (
            "heal",
            folded_directory,
            "--train",
            text_file,
            "--steps",
            "1",
            "--batch",
            "1",
            "--block",
            "32",
            "--out",
        ),
        "report": ("report", folded_directory, "--no-samples", "--out"),
    }


@pytest.mark.parametrize("name", ["größer 模型", "a\nb", "💥", "n" * 200, "new/parents/out", "/".join(["d" * 100] * 9)])
def test_odd_names_are_written(command, commands, workplace, name):
    for kind in ("fold", "report"):
        outcome = command(*commands[kind], f"{kind}{name}"[:200] if len(name) == 200 else f"{kind}-{name}")
        assert outcome.status == 0, outcome.err
    for folder, directories, files in os.walk(workplace):
        assert not [each for each in (*directories, *files) if each.endswith(".partial")], folder


IMPOSSIBLE = ["n" * 201, "n" * 300, "é" * 150, "x/" * 2000 + "y", "a\0b", "file/below", "loop", "loop/x", "/dev/null/x",
              "x/" + "n" * 300]  # fmt: skip


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_names_are_refused_at_once(refused, commands, workplace, monkeypatch, name):
    def unreachable(*_, **__):
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("tensorfold.hf.sources.find_model", unreachable)
    (workplace / "file").write_text("mine")
    (workplace / "loop").symlink_to("loop")
    for kind, arguments in commands.items():
        if kind not in ("heal", "report"):  # these commands check their inputs first
            refused(*arguments, name, says=[])
    monkeypatch.undo()
    os.chdir(workplace)
    for kind in ("heal", "report"):
        refused(*commands[kind], name, says=[])
    assert sorted(os.listdir(workplace)) == ["file", "loop"]


def test_parents_of_a_refused_place_are_not_left(workplace):
    with pytest.raises(InputError):
        check_place(Path("a/b/" + "n" * 250))
    assert os.listdir(workplace) == []


@pytest.mark.parametrize(("aim", "status"), [("nothing", 0), ("empty", 0), ("full", 2), ("file", 2)])
def test_links_are_followed_or_refused(command, commands, workplace, aim, status):
    (workplace / "empty").mkdir()
    (workplace / "full").mkdir()
    (workplace / "full" / "mine").write_text("mine")
    (workplace / "file").write_text("mine")
    for kind in ("fold", "calibrated", "export"):
        (workplace / "out").symlink_to(f"{aim}-{kind}" if aim == "nothing" else aim)
        outcome = command(*commands[kind], "out")
        assert outcome.status == status, outcome.err
        assert (workplace / "out").is_symlink()
        if status == 0:
            assert (workplace / "out" / "config.json").is_file()
        (workplace / "out").unlink()
        for path in (workplace / "empty").iterdir():
            path.unlink()
    assert (workplace / "full" / "mine").read_text() == (workplace / "file").read_text() == "mine"
    assert not [name for name in os.listdir(workplace) if name.startswith((".", "out"))]


@pytest.mark.parametrize(("kind", "work"), [("calibrated", "out.fold"), ("heal", "out.heal")])
def test_a_second_process_is_told(command, commands, workplace, kind, work):
    with claimed(workplace / work, "wait"):
        (workplace / work / "mine").write_text("mine")
        outcome = command(*commands[kind], "out")
        assert outcome.status == 1
        assert f"{work} is in use by another process" in outcome.err
        assert outcome.err.count("\n") == 1
        assert os.listdir(workplace / work) == ["mine"]
        (workplace / work / "mine").unlink()
    assert command(*commands[kind], "out").status == 0
    assert os.listdir(workplace) == ["out"]


def test_a_claim_is_for_one_and_leaves_nothing(tmp_path):
    inside, most, refused = [], [], []

    def work():
        for _ in range(20):
            try:
                with claimed(tmp_path / "work", "wait"):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
            except TensorfoldError:
                refused.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(most) + len(refused) == 80
    assert os.listdir(tmp_path) == []


def test_a_full_disk_in_the_words_of_torch():
    assert is_disk_full(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"))
    assert not is_disk_full(RuntimeError("unexpected key"))


def test_a_recipe_is_copied_whole_or_not_at_all(command, workplace, monkeypatch):
    def no_space(*_, **__):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("os.fsync", no_space)
    outcome = command("recipes", "low-rank-80", "--copy", "own.yaml")
    monkeypatch.undo()
    assert outcome.status == 2
    assert "The disk is full" in outcome.err
    assert os.listdir(workplace) == []


def test_a_folder_that_a_checkpoint_cannot_make_is_named(tmp_path):
    store = BlockCheckpoints(tmp_path, "key", "fold")
    assert store.folder("gradients") == store.folder("gradients") == tmp_path / "gradients"
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(InputError, match=r"taken cannot be created \(.*\); free its name"):
        store.folder("taken")
