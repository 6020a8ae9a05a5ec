"""The suite goes on where one of its processes is lost: no worker waits for ever, and the lost test is run again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CONFTEST = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from lost_workers import Scheduling

def pytest_xdist_make_scheduler(config, log):
    return Scheduling(config, log)

def pytest_handlecrashitem(crashitem, report, sched):
    if sched.is_first_loss(crashitem):
        report.outcome = "lost"
"""
KILLED = """
def test_killed():
    import os
    with open("times", "a") as file:
        file.write("x")
    if len(open("times").read()) <= {times}:
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(
    ("times", "status", "summary"), [(1, 0, "32 passed, 1 lost"), (2, 1, "1 failed, 32 passed, 1 lost")]
)
def test_a_run_ends_after_a_worker_was_lost(tmp_path, times, status, summary):
    """Files of one test each, after a loss among which xdist's own scheduling waits for ever."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    for k in range(32):
        (tmp_path / f"test_{k:02d}.py").write_text("def test_nothing():\n    pass\n")
    (tmp_path / "test_20.py").write_text(KILLED.format(times=times))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    options = ["-q", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1].startswith(summary), done.stdout
    assert done.returncode == status
