import errno
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from tensorfold.errors import InputError, TensorfoldError
from tensorfold.utils import atomic_files as cache
from tensorfold.utils.atomic_files import atomic_directory, cache_directory, write_file
from tensorfold.utils.claims import claimed

pytestmark = pytest.mark.forks


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def write(target: Path, name: str = "a", fails_with: type[BaseException] | None = None, **options: bool) -> None:
    with atomic_directory(target, **options) as temporary:
        (temporary / name).write_text(name)
        if fails_with:
            raise fails_with


def test_cache_directory_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("TENSORFOLD_CACHE", str(tmp_path / "own"))
    assert cache_directory("tokens") == tmp_path / "own" / "tokens"
    monkeypatch.delenv("TENSORFOLD_CACHE")
    assert cache_directory("tokens") == tmp_path / "xdg" / "tensorfold" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory("tokens") == tmp_path / "home" / ".cache" / "tensorfold" / "tokens"
    assert cache_directory("tokens").is_dir()


def test_a_file_system_without_locks_is_written_to_all_the_same(tmp_path, monkeypatch):
    def unsupported(*_, **__):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr("filelock.lock_descriptor", unsupported)
    # Of another process, which may be at work: without locks nobody can tell.
    (tmp_path / ".model.0123abcd.partial").mkdir()
    write(tmp_path / "model")
    assert names(tmp_path) == [".model.0123abcd.partial", "model"]
    with claimed(tmp_path / "work", "wait"):
        assert (tmp_path / "work").is_dir()
    assert not (tmp_path / "work").exists()


def test_cache_directory_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TENSORFOLD_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="TENSORFOLD_CACHE"):
        cache_directory("tokens")


def test_target_appears_only_at_the_end(tmp_path):
    target = tmp_path / "parent" / "model"
    with atomic_directory(target) as temporary:
        assert temporary.parent == target.parent
        assert temporary.name.startswith(".")
        assert temporary.name.endswith(".partial")
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("a")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "a"
    assert names(target.parent) == ["model"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("replace", [False, True])
def test_error_leaves_everything_as_it_was(tmp_path, error, replace):
    target = tmp_path / "model"
    if replace:
        target.mkdir()
        (target / "old").write_text("old")
    before = names(tmp_path)
    with pytest.raises(error):
        write(target, fails_with=error, replace=replace)
    assert names(tmp_path) == before
    assert not replace or names(target) == ["old"]


def test_existing_target_is_refused_unless_told(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    write(target, "first")  # an empty directory may be written to
    with pytest.raises(InputError, match="already exists"), atomic_directory(target):
        pytest.fail("the block must not run")
    write(target, "second", keep_existing=True)
    assert names(target) == ["first"]
    write(target, "third", replace=True)
    assert names(target) == ["third"]
    assert names(tmp_path) == ["model"]


def test_file_as_target_is_refused(tmp_path):
    (tmp_path / "model").write_text("precious")
    for options in ({}, {"replace": True}, {"keep_existing": True}):
        with pytest.raises(InputError, match="is a file"), atomic_directory(tmp_path / "model", **options):
            pytest.fail("the block must not run")
    assert (tmp_path / "model").read_text() == "precious"


def test_target_written_meanwhile_is_not_overwritten(tmp_path):
    target = tmp_path / "model"

    def overtaken():
        with atomic_directory(target):
            write(target, "theirs", keep_existing=True)

    with pytest.raises(InputError, match="another process"):
        overtaken()
    assert names(target) == ["theirs"]
    assert names(tmp_path) == ["model"]


def test_symbolic_link_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "disk") == ["a"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk(tmp_path):
    def fill():
        with atomic_directory(tmp_path / "model"), open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    with pytest.raises(TensorfoldError, match=r"disk is full.*model was not written") as caught:
        fill()
    assert not isinstance(caught.value, InputError)
    assert isinstance(caught.value.__cause__, OSError)
    assert names(tmp_path) == []


def test_full_disk_found_when_flushing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TensorfoldError, match="disk is full"):
        write(tmp_path / "model")
    assert names(tmp_path) == []


def test_full_disk_reported_by_a_foreign_writer(tmp_path):
    with pytest.raises(TensorfoldError, match="disk is full"), atomic_directory(tmp_path / "model"):
        raise RuntimeError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error 28)")
    with pytest.raises(TensorfoldError, match="disk is full"), atomic_directory(tmp_path / "model"):
        raise RuntimeError("unexpected position") from OSError(errno.EDQUOT, "")
    with pytest.raises(OSError, match="other"), atomic_directory(tmp_path / "model"):
        raise OSError(errno.EIO, "other")


def _write_and_die(target, step):
    if step == "writing":
        with atomic_directory(target) as temporary:
            (temporary / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    cache.shutil.rmtree = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # dies right after the second rename
    if step == "swapping":
        rename = Path.rename

        def die_before_second(self, other):
            if Path(other) == target:
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(self, other)

        Path.rename = die_before_second
    with atomic_directory(target, replace=True) as temporary:
        (temporary / "new").write_text("new")


def _killed(target, step):
    process = multiprocessing.get_context("fork").Process(target=_write_and_die, args=(target, step))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_leftover_of_a_killed_process_is_cleared(tmp_path):
    target = tmp_path / "model"
    with atomic_directory(tmp_path / "model.v2") as other:  # a live process with another target
        _killed(target, "writing")
        assert len(names(tmp_path)) == 2
        with atomic_directory(target) as temporary:
            (temporary / "whole").write_text("whole")
            with atomic_directory(target, keep_existing=True) as second:  # a live process with the same target
                assert temporary.exists()
                assert second.exists()
        assert other.exists()
    assert names(tmp_path) == ["model", "model.v2"]
    assert names(target) == ["whole"]


def test_only_its_own_target_restores_a_replaced_directory(tmp_path):
    write(tmp_path / "model.v2", "old")
    _killed(tmp_path / "model.v2", "swapping")
    write(tmp_path / "model")
    with pytest.raises(InputError, match="already exists"):
        write(tmp_path / "model.v2")
    assert names(tmp_path / "model.v2") == ["old"]


@pytest.mark.parametrize(("step", "survivor"), [("swapping", "old"), ("clearing", "new")])
def test_kill_while_replacing_loses_nothing(tmp_path, step, survivor):
    target = tmp_path / "model"
    write(target, "old")
    _killed(target, step)
    assert len(names(tmp_path)) >= 2
    with pytest.raises(InputError, match="already exists"), atomic_directory(target):
        pytest.fail("the block must not run")
    assert names(target) == [survivor]
    assert names(tmp_path) == ["model"]


def _race(target, barrier, mark):
    barrier.wait()
    with atomic_directory(target, keep_existing=True) as temporary:
        for name in "ab":
            (temporary / name).write_text(mark)
        barrier.wait()


def test_racing_processes_leave_one_whole_result(tmp_path):
    target, context = tmp_path / "model", multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [context.Process(target=_race, args=(target, barrier, str(mark))) for mark in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (target / "a").read_text() == (target / "b").read_text() != ""
    assert names(tmp_path) == ["model"]


def test_a_file_is_written_whole_and_replaces_a_file(tmp_path):
    target = tmp_path / "deep" / "report.html"
    for content in (b"one", b"two"):
        write_file(target, content)
        assert target.read_bytes() == content
        assert names(target.parent) == ["report.html"]


def test_a_file_that_cannot_be_written_is_left_as_it_was(tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    write_file(target, b"one")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(TensorfoldError, match="disk is full"):
        write_file(target, b"two")
    assert target.read_bytes() == b"one"
    assert names(tmp_path) == ["report.html"]


def test_only_a_file_is_replaced_by_a_file(tmp_path):
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    for name in ("directory", "pipe", "file/below"):
        with pytest.raises(InputError):
            write_file(tmp_path / name, b"")
    assert names(tmp_path) == ["directory", "file", "pipe"]


def test_what_a_killed_writer_of_the_same_file_left_is_cleared(tmp_path):
    (tmp_path / ".report.html.0123abcd.partial").write_text("half")
    (tmp_path / ".other.html.0123abcd.partial").write_text("half")
    write_file(tmp_path / "report.html", b"one")
    assert names(tmp_path) == [".other.html.0123abcd.partial", "report.html"]
