"""Full disks, read-only ones, links, names, and two processes at one output: message, exit status, and what is left.

    sudo python studies/reliability/disk.py --log studies/reliability/disk.jsonl

Mounts small tmpfs file systems, so it needs root on Linux. Every command is a fork of this process. A full disk is one
of another free size each time, from nothing to nearly enough; afterwards there is room, and the same command must
succeed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from templates import make_templates

import tensorfold
from tensorfold.cli.main import run

FULL = 20
# Work that is kept for the next attempt, by design.
KEPT = ("out.fold", "out.heal", "outfold", "out.runs")


def forked(arguments: list[str], work: Path) -> Callable[[], tuple[int, str]]:
    """Start a command in a fork; the result waits for it and gives exit status and standard error."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.chdir(work)
        os.dup2(write, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            run(arguments)
        except SystemExit as stopped:
            os._exit(int(stopped.code or 0))
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}".encode())
            os._exit(70)
        os._exit(0)
    os.close(write)

    def wait() -> tuple[int, str]:
        with os.fdopen(read, "rb") as pipe:
            said = pipe.read().decode(errors="replace")
        _, status = os.waitpid(child, 0)
        return (os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1), said.strip()

    return wait


@contextlib.contextmanager
def mounted(place: Path, size: str) -> Iterator[Path]:
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", place], check=True)


def judge(
    status: int, said: str, work: Path, expected: tuple[int, ...], words: str = "", may: tuple[str, ...] = ()
) -> Any:
    """What is wrong: another status, no clear line, or something left."""
    wrong = []
    if status not in expected:
        wrong.append(f"status {status}")
    if status and (not said.startswith("tensorfold: ") or "\n" in said or "unexpected" in said or words not in said):
        wrong.append("message")
    left = sorted(entry.name for entry in os.scandir(work))
    debris = [name for name in left if name not in may and (name.startswith(".") or status)]
    if debris:
        wrong.append(f"left {debris}")
    return wrong


def log_entry(what: str, command: str, status: int, said: str, wrong: list[str], **more: Any) -> dict[str, Any]:
    """A line of the log."""
    return {"what": what, "command": command, **more, "status": status, "said": said[:200], "wrong": wrong}


def commands(templates: Path) -> dict[str, list[str]]:
    dense, folded, text = (str(templates / name) for name in ("dense", "folded", "prose.txt"))
    half = ["--keep", "0.5"]
    return {
        "fold": ["fold", dense, *half, "--out", "out"],
        "fold, calibrated": ["fold", dense, *half, "--calibrate", text, "--tokens", "200", "--out", "out"],
        "export dense": ["export", folded, "--to", "dense", "--out", "out"],
        "export int8": ["export", folded, "--to", "int8", "--out", "out"],
        "heal": ["heal", folded, "--train", text, "--steps", "2", "--batch", "1", "--block", "32", "--out", "out"],
        "report": ["report", folded, "--no-samples", "--out", "out.html"],
        "recipes": ["recipes", "low-rank-80", "--copy", "own.yaml"],
    }


def full(templates: Path, scratch: Path) -> Iterator[dict[str, Any]]:
    """A disk of ``k`` times what the output needs over FULL, for k below FULL; then one with room."""
    for name, arguments in commands(templates).items():
        with mounted(scratch / "disk", "100m") as disk:
            wait = forked(arguments, disk)
            status, said = wait()
            assert status == 0, (name, said)
            needed = sum(f.stat().st_blocks * 512 for f in disk.rglob("*"))
        for k in range(FULL) if name.startswith(("fold", "heal")) else range(0, FULL, 4):
            pages = max(1, needed * k // FULL // 4096)
            with mounted(scratch / "disk", f"{pages * 4}k") as disk:
                if k == 0:
                    (disk / "filler").write_bytes(b"x" * 4096)
                may = (*KEPT, "filler")
                status, said = forked(arguments, disk)()
                wrong = judge(status, said, disk, (0, 2), "disk is full", may)
                remount(disk, "size=100m")
                again, then = forked(arguments, disk)()
                if status == 0:
                    wrong += [] if again in (0, 2) else ["the second run fails"]
                else:
                    wrong += [f"afterwards: {each}" for each in judge(again, then, disk, (0,), may=("filler",))]
                    left = sorted(entry.name for entry in os.scandir(disk) if entry.name not in ("filler", "out"))
                    beside = [each for each in left if each not in ("out.html", "own.yaml")]
                    wrong += [f"afterwards left {beside}"] if beside else []
            yield log_entry("full", name, status, said, wrong, free_kb=pages * 4)


def read_only(templates: Path, scratch: Path) -> Iterator[dict[str, Any]]:
    """A file system that takes nothing, for root neither."""
    for name, arguments in commands(templates).items():
        with mounted(scratch / "disk", "10m") as disk:
            remount(disk, "ro")
            status, said = forked(arguments, disk)()
            wrong = judge(status, said, disk, (2,), "out" if name != "recipes" else "")
            yield log_entry("read-only", name, status, said, wrong)


def links(templates: Path, scratch: Path) -> Iterator[dict[str, Any]]:
    """Links in the place of the output."""
    kinds: dict[str, tuple[int, ...]] = {
        "dangling": (0,), "to an empty directory": (0,), "to a full directory": (2,), "to a file": (2,),
        "in a circle": (2,),
    }  # fmt: skip
    for name, arguments in commands(templates).items():
        if name in ("report", "recipes"):
            continue
        for kind, expected in kinds.items():
            with tempfile.TemporaryDirectory(dir=scratch) as directory:
                work, aim = Path(directory), Path(directory) / "aim"
                if kind == "to a file":
                    aim.write_text("mine")
                elif kind.endswith("directory"):
                    aim.mkdir()
                    if "full" in kind:
                        (aim / "mine").write_text("mine")
                (work / "out").symlink_to("out" if kind == "in a circle" else "aim")
                status, said = forked(arguments, work)()
                wrong = judge(status, said, work, expected, may=("out", "aim"))
                if not (work / "out").is_symlink():
                    wrong.append("the link is gone")
                if status == 0 and not (aim / "config.json").is_file():
                    wrong.append("nothing where the link points")
                if status and aim.exists() and sorted(p.name for p in aim.rglob("*")) not in ([], ["mine"]):
                    wrong.append("what the link points to was changed")
                left = sorted(entry.name for entry in os.scandir(work) if entry.name not in ("out", "aim"))
                wrong += [f"left {left}"] if left else []
                yield log_entry("link", name, status, said, wrong, kind=kind)


def names(templates: Path, scratch: Path) -> Iterator[dict[str, Any]]:
    """Names of the output that are not everybody's."""
    deep = "/".join(["d" * 100] * 30)
    asked: dict[str, tuple[int, ...]] = {
        "größer 模型": (0,), "a b\tc": (0,), "a\nb": (0,), "-x": (0,), "e\u0301": (0,), "💥": (0,), "n" * 200: (0,),
        "n" * 201: (2,), "é" * 127: (2,), "n" * 256: (2,), deep: (0,), deep + "/" + deep: (2,), "d/" * 300 + "x": (2,),
        "'\"$(x)": (0,), "new/parents/out": (0,),
    }  # fmt: skip
    for name, arguments in commands(templates).items():
        if name in ("recipes", "fold, calibrated"):
            continue
        for out, expected in asked.items():
            with tempfile.TemporaryDirectory(dir=scratch) as directory:
                work = Path(directory)
                status, said = forked([*arguments[:-2], f"--out={out}"], work)()
                wrong = judge(status, said, work, expected, may=(out.partition("/")[0],) if status == 0 else ())
                target = work / out
                if status == 0 and not (target if name == "report" else target / "config.json").is_file():
                    wrong.append("nothing was written")
                if status == 0 and len(os.listdir(target.parent)) != 1:
                    wrong.append(f"beside it {os.listdir(target.parent)}")
                shown = f"{out[:12]!r}, {len(out.encode())} bytes"
                yield log_entry("name", name, status, said, wrong, kind=shown)


def two(templates: Path, scratch: Path) -> Iterator[dict[str, Any]]:
    """Two processes that write one output at once: one wins, the other says so or has nothing to do."""
    for name, arguments in commands(templates).items():
        for _ in range(3):
            with tempfile.TemporaryDirectory(dir=scratch) as directory:
                work = Path(directory)
                waits = [forked(arguments, work), forked(arguments, work)]
                found: list[tuple[int, str]] = []
                threads = [threading.Thread(target=_note, args=(wait, found)) for wait in waits]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                statuses = sorted(status for status, _ in found)
                wrong = [] if statuses[0] == 0 and statuses[1] in (0, 1, 2) else [f"statuses {statuses}"]
                for status, said in found:
                    if status and (not said.startswith("tensorfold: ") or "unexpected" in said or "\n" in said):
                        wrong.append("message")
                left = sorted(os.listdir(work))
                wrong += [f"left {left}"] if len(left) != 1 else []
                if (work / "out").is_dir():
                    tensorfold.load(work / "out")
                said = " / ".join(said for _, said in found)
                yield {"what": "two at once", "command": name, "status": statuses, "said": said[:300], "wrong": wrong}


def _note(wait: Callable[[], tuple[int, str]], found: list[tuple[int, str]]) -> None:
    found.append(wait())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, default=Path(__file__).with_name("disk.jsonl"))
    parser.add_argument("--only", choices=("full", "read_only", "links", "names", "two"), action="append")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = {f.__name__: f for f in (full, read_only, links, names, two)}
    counts: Counter[tuple[str, bool]] = Counter()
    with tempfile.TemporaryDirectory() as directory, args.log.open("w", encoding="utf-8") as log:
        scratch = Path(directory)
        os.environ["TENSORFOLD_CACHE"] = str(scratch / "cache")
        templates = make_templates(scratch / "templates")
        for name in args.only or chosen:
            for entry in chosen[name](templates, scratch):
                entry["said"] = entry["said"].replace(directory, "")
                log.write(json.dumps(entry) + "\n")
                log.flush()
                counts[entry["what"], not entry["wrong"]] += 1
                if entry["wrong"]:
                    print(entry, file=sys.stderr)
    print(counts)


if __name__ == "__main__":
    main()
