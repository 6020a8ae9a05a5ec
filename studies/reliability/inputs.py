"""Thousands of bad inputs, over every command and every public function, in one process.

    python studies/reliability/inputs.py --cases 2400 --calls 800 --tasks 60 --summary studies/reliability/inputs.jsonl

Each must end with one clear line on standard error and the Contract's exit status, or succeed: no traceback, no hang,
no half-written output, nothing else touched. A case follows from ``--seed`` and its number alone, so that the same
command goes on after an interruption, and ``--only N`` repeats one and shows what it printed. Cases that crash the
process or hang in native code are found by the next start, which notes them and goes on. Calls of public functions come
from hypothesis (``calls.py``).

``--log`` has a line a case. ``--summary``, of which ``inputs.jsonl`` is the whole campaign's, is what is kept of it: a
line for each way to end, with the numbers of the cases that ended so and the message of the first of them, and a line
for every case that went wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    # As the command line sets them before its imports.
    os.environ.update(TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1")
    os.environ.pop("TENSORFOLD_DATA", None)

sys.path.insert(0, str(Path(__file__).parent))

from cases import Case, make_case
from templates import make_templates

SECONDS = {"onnx": 240, "tasks": 180}  # tracing takes tens of seconds, and so does indexing all of the harness's tasks
USUAL_SECONDS = 30
MEMORY = 12 * 2**30  # of address space; the libraries alone take some four


class HangError(BaseException):
    """Not an ``Exception``: nothing that is tested may catch it."""


def _ring(*_: object) -> None:
    raise HangError


@contextlib.contextmanager
def captured(file: Path) -> Iterator[None]:
    """Standard output and error of this process, native code included, go to ``file``.out and ``file``.err."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    try:
        for number, suffix in ((1, ".out"), (2, ".err")):
            descriptor = os.open(f"{file}{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, number)
            os.close(descriptor)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, number in zip(kept, (1, 2), strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)


def snapshot(root: Path) -> dict[str, tuple[int, int, int]]:
    """Every entry below a directory, with what changes when it is written."""
    found = {}
    for folder, directories, files in os.walk(root):
        for name in (*directories, *files):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            whole = not os.path.isdir(path)
            found[os.path.relpath(path, root)] = (status.st_mode, status.st_size * whole, status.st_mtime_ns * whole)
    return found


@contextlib.contextmanager
def timed(seconds: float) -> Iterator[None]:
    """Raise :class:`HangError` after ``seconds``; end the process where native code does not let that happen."""
    previous = signal.signal(signal.SIGALRM, _ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    faulthandler.dump_traceback_later(4 * seconds, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, previous)


def run_case(case: Case, scratch: Path, templates: Path) -> dict[str, Any]:
    """Run the command in the working directory and judge what it did."""
    from tensorfold.cli.main import run

    work = Path.cwd()
    before, kept = snapshot(work), snapshot(templates)
    files = scratch / "printed"
    status: int | str = "returned"
    started = time.monotonic()
    with captured(files):
        try:
            with timed(SECONDS.get(case.kind, USUAL_SECONDS)):
                run(case.arguments)
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else 0 if stopped.code is None else 1
        except HangError:
            status = "hang"
        except BaseException as error:
            status = f"{type(error).__name__}: {error}"[:300]
    out = Path(f"{files}.out").read_text(errors="replace")
    err = Path(f"{files}.err").read_text(errors="replace")
    after = snapshot(work)
    wrong = list(_wrongs(case, status, out, err, before, after))
    if snapshot(templates) != kept:
        wrong.append("a model outside was changed")
    verdict = "wrong" if wrong else "accepted" if status == 0 else "failed" if status == 1 else "refused"
    line = (err.strip().splitlines() or [""])[-1]
    found = {"kind": case.kind, "command": case.arguments[0] if case.arguments else "", "what": case.what[:160]}
    line = line.replace(f"{scratch}/", "")
    found["what"] = found["what"].replace(f"{scratch}/", "")
    found.update(verdict=verdict, status=status, message=line, seconds=round(time.monotonic() - started, 2))
    return {**found, "wrong": wrong} if wrong else found


def _wrongs(
    case: Case, status: int | str, out: str, err: str, before: dict[str, Any], after: dict[str, Any]
) -> Iterator[str]:
    if status not in (0, 1, 2):
        yield f"ended with {status}"
    if "Traceback (most recent" in err or "panicked at" in err:
        yield "traceback"
    if "unexpected " in err.rpartition("tensorfold: ")[2][:14]:
        yield "unexpected exception"
    if status in (1, 2):
        # Progress bars are no messages.
        lines = [line for line in err.strip().splitlines() if line and not re.search(r"(/s|s/it)\]$", line.strip())]
        if not lines or not lines[-1].startswith("tensorfold: "):
            yield "no message"
        elif len(lines) > 1:
            yield "more than one line"
        elif len(lines[0]) > 1500:
            yield "a message of more than 1500 characters"
        if out and case.arguments[0] != "sample":
            yield "output in spite of failure"
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    allowed = {"out", "out.html", *case.may_change} if status == 0 else set()
    if case.kind == "path" or "--copy" in case.arguments or case.kind == "option":
        allowed |= {name for name in changed if status == 0}
    beyond = sorted(name for name in changed if name.split("/")[0] not in allowed and name not in allowed)
    if beyond:
        yield f"left or changed {', '.join(beyond[:4])}"
    if status == 0 and "out" in after and not Path("out/config.json").is_file():
        yield "half-written output"


def fresh(scratch: Path) -> Path:
    work = scratch / "work"
    os.chdir(scratch)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    os.chdir(work)
    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2400)
    parser.add_argument("--calls", type=int, default=800, help="of public functions")
    parser.add_argument("--onnx", type=int, default=0, help="cases of export --to onnx, slow")
    parser.add_argument("--tasks", type=int, default=0, help="cases of eval --protocol lm-eval, an extra")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="run this case, such as 12 or onnx-3, and show what it prints")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "tensorfold-reliability")
    parser.add_argument("--log", type=Path, help="a line a case; cases.jsonl in --scratch if not given")
    parser.add_argument("--summary", type=Path, help="a line a way to end; summary.jsonl in --scratch if not given")
    args = parser.parse_args()
    args.scratch = args.scratch.resolve()
    args.log = (args.log or args.scratch / "cases.jsonl").resolve()
    args.summary = (args.summary or args.scratch / "summary.jsonl").resolve()
    os.environ["HF_DATASETS_CACHE"] = str(args.scratch / "cache" / "datasets")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.environ["TENSORFOLD_CACHE"] = str(args.scratch / "cache")
    templates = make_templates(args.scratch / "templates")
    import torch

    torch.set_num_threads(1)
    if args.only:
        for number in args.only:
            fresh(args.scratch)
            case = make_case(number, args.seed, templates)
            print(number, case)
            print(json.dumps(run_case(case, args.scratch, templates), indent=1))
            print(Path(f"{args.scratch / 'printed'}.err").read_text(errors="replace")[-6000:])
        return
    known = [json.loads(line) for line in args.log.read_text().splitlines()] if args.log.exists() else []
    done = {entry["number"] for entry in known if "number" in entry}
    current = args.scratch / "current"
    special = [f"{kind}-{number}" for kind in ("onnx", "tasks") for number in range(getattr(args, kind))]
    for number in (*range(args.first, args.first + args.cases), *special):
        if number in done:
            continue
        fresh(args.scratch)
        case = make_case(number, args.seed, templates)
        if current.exists() and current.read_text() == str(number):
            entry = {"kind": case.kind, "command": case.arguments[0], "what": case.what[:160], "verdict": "wrong"}
            entry["wrong"] = ["crashed the process, or hung in native code"]
        else:
            current.write_text(str(number))
            entry = run_case(case, args.scratch, templates)
        _append(args.log, {"number": number, **entry})
        current.unlink()
        if entry["verdict"] == "wrong":
            print(number, entry["command"], entry["what"], entry["wrong"], entry.get("message"), file=sys.stderr)
    if args.calls and not any("call" in entry for entry in known):
        from calls import call_everything

        fresh(args.scratch)
        note: Callable[[dict[str, Any]], None] = lambda entry: _append(args.log, entry)  # noqa: E731
        call_everything(args.calls, templates, note, timed, captured, args.scratch / "printed")
    entries = [json.loads(line) for line in args.log.read_text().splitlines()]
    lines = [json.dumps(line, ensure_ascii=False) for line in summarise(entries)]
    args.summary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(Counter(entry["verdict"] for entry in entries))


def summarise(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a log says, without its repetitions: a line for each way to end, and all that went wrong as it is.

    Messages that are alike but for names, numbers and what they quote are one way. Cases of commands are given by their
    numbers, calls of functions by how many there were.
    """
    ways: dict[tuple[Any, ...], dict[str, Any]] = {}
    wrong = [entry for entry in entries if entry["verdict"] == "wrong"]
    for entry in entries:
        message = entry.get("message", "") if entry["verdict"] in ("refused", "failed") else ""
        name = {key: entry[key] for key in ("command", "call") if key in entry}
        alike = re.sub(r"=[^;]*|got [^;]*|'[^']*'?|\"[^\"]*\"?|\S*\d\S*|^tensorfold: \S+:", "…", message)[:40]
        ended = {**name, "verdict": entry["verdict"], **({"message": message} if message else {})}
        way = ways.setdefault((*name.items(), entry["verdict"], alike), {**ended, "count": 0, "cases": []})
        way["count"] += 1
        way["cases"] += [entry["number"]] if "number" in entry else []
    for way in ways.values():
        way.pop("count" if way["cases"] else "cases")
    return [*wrong, *(way for way in ways.values() if way["verdict"] != "wrong")]


def _append(log: Path, entry: dict[str, Any]) -> None:
    entry.pop("seconds", None)
    short = {key: value[:72] if isinstance(value, str) else value for key, value in entry.items()}
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(short) + "\n")


if __name__ == "__main__":
    main()
