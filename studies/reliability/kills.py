"""A hundred SIGKILLs at random moments of fold, heal, export and report; what the rerun gives, and what is left lying.

    python studies/reliability/kills.py --kills 100 --log studies/reliability/kills.jsonl
    python studies/reliability/kills.py --only compress --kills 10 --log kills_compress.jsonl
    python studies/reliability/kills.py --only compress --kills 12 --in-a-row 10 --log kills_compress.jsonl

The libraries are imported once; every run is a fork of this process, killed after a seeded part of the time that the
command takes by itself. Then the same command is run again: it must succeed, its output must be byte-equal to that of
a run nobody killed, and nothing else may lie beside it. Speeds that ``compress`` measures differ by right, and are
replaced by constants, so that its table and its report can be compared too.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from templates import llama, make_templates, tokenizer

from tensorfold.benchmark import whole as whole_models
from tensorfold.cli.main import run

# What differs between two runs by right: how long they took, and whether they were resumed.
VOLATILE = ("README.md",)
COMMANDS = {
    "fold": ["fold", "{dense}", "--keep", "0.5", "--targets", "mlp,attention,embedding", "--out", "out"],
    "fold, calibrated": ["fold", "{dense}", "--keep", "0.5", "--targets", "all-linear", "--calibrate", "{text}",
                         "--tokens", "1200", "--effort", "high", "--out", "out"],
    "heal": ["heal", "{folded}", "--train", "{text}", "--teacher", "{dense}", "--steps", "12", "--batch", "2",
             "--block", "32", "--blockwise-tokens", "256", "--set", "save_every=3", "--out", "out"],
    "export dense": ["export", "{folded}", "--to", "dense", "--out", "out"],
    "export int8": ["export", "{folded}", "--to", "int8", "--out", "out"],
    "report": ["report", "{folded}", "{dense}", "--tokens", "8", "--out", "out.html"],
    "compress": ["compress", "{dense}", "--size", "0.8", "--text", "{text}", "--unseen", "python-docs",
                 "--tokens", "600", "--max-tokens", "300", "--minutes", "0.05", "--effort", "low", "--out", "out"],
}  # fmt: skip


def forked(arguments: list[str], work: Path, kill_after: float | None) -> tuple[float, bool, int]:
    """Run a command in a fork; seconds it took, whether it was killed, and its exit status."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.chdir(work)
        null = os.open(os.devnull, os.O_RDWR)
        for number in (1, 2):
            os.dup2(null, number)
        try:
            run(arguments)
        except SystemExit as stopped:
            os._exit(int(stopped.code or 0))
        except BaseException:
            os._exit(70)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status)
    return time.monotonic() - started, killed, -1 if killed else os.WEXITSTATUS(status)


def digests(work: Path) -> dict[str, str]:
    """Of every file below the working directory, without what tells the time."""
    found = {}
    for path in sorted(work.rglob("*")):
        name = str(path.relative_to(work))
        if path.is_dir():
            found[f"{name}/"] = ""
            continue
        content = path.read_bytes()
        if path.suffix == ".jsonl" or path.name in ("tensorfold.json", "compress.json") or path.parent.name == ".steps":
            content = "\n".join(_timeless(line) for line in _records(path)).encode()
        found[name] = "" if path.name in VOLATILE else hashlib.sha256(content).hexdigest()[:16]
    return found


def _records(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else [json.loads(text)]


def _timeless(value: Any) -> str:
    def without(each: Any) -> Any:
        if isinstance(each, dict):
            # A step of compress notes the hashes of its files, some of which say how long it took.
            return {k: without(v) for k, v in each.items() if "second" not in k and k not in ("resumed", "files")}
        return [without(v) for v in each] if isinstance(each, list) else each

    return json.dumps(without(value), sort_keys=True)


def constant_speeds(models: Iterable[str], *_: Any) -> tuple[SimpleNamespace, SimpleNamespace]:
    """Stands in for the measurement of ``compress``."""
    found = SimpleNamespace(tokens_per_second=dict.fromkeys(models, 100.0))
    return found, found


def fresh(scratch: Path) -> Path:
    work = scratch / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--only", choices=list(COMMANDS), help="by default all but compress")
    parser.add_argument(
        "--in-a-row", type=int, default=1, help="how often each run is killed, if it does not get to its end"
    )
    parser.add_argument("--keep", type=Path, help="copy what is unequal here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path(__file__).with_name("kills.jsonl"))
    args = parser.parse_args()
    log = args.log.resolve()
    torch.set_num_threads(1)
    whole_models.bench_models = constant_speeds  # type: ignore[assignment]
    chosen = [args.only] if args.only else [name for name in COMMANDS if name != "compress"]
    entries = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        os.environ["TENSORFOLD_CACHE"] = str(scratch / "cache")
        templates = make_templates(scratch / "templates")
        larger = scratch / "larger"  # so that writing takes a while, too
        llama(layers=6, width=128).save_pretrained(larger)
        tokenizer().save_pretrained(larger)
        places = {"dense": larger, "folded": templates / "folded", "text": templates / "prose.txt"}
        forked(["fold", str(larger), "--keep", "0.5", "--out", str(scratch / "folded")], scratch, None)
        places["folded"] = scratch / "folded"
        commands = {
            name: [word.format(**places) for word in words] for name, words in COMMANDS.items() if name in chosen
        }
        whole: dict[str, tuple[float, dict[str, str]]] = {}
        for name, words in commands.items():
            forked(words, fresh(scratch), None)  # fills caches
            work = fresh(scratch)
            seconds, _, status = forked(words, work, None)
            if status:
                raise SystemExit(f"{name} fails without being killed: {status}")
            whole[name] = seconds, digests(work)
            if args.keep is not None:
                shutil.copytree(work, args.keep / name, dirs_exist_ok=True)
        for number in range(len(entries), args.kills):
            random = Random(f"{args.seed}:{number}")
            name = list(commands)[number % len(commands)]
            seconds, expected = whole[name]
            kills = 0
            while not kills:  # a kill that comes after the end is none
                work = fresh(scratch)
                for _ in range(args.in_a_row):
                    after = random.uniform(0.0, 1.0) * seconds / min(3, args.in_a_row)
                    _, killed, _ = forked(commands[name], work, after)
                    if not killed:  # it got to its end
                        break
                    kills += 1
            left = sorted(path.name for path in work.iterdir())
            _, _, status = forked(commands[name], work, None)
            # Killed after its last write, a command has done its work, and says so when it is run again.
            complete = bool(status == 2 and left == sorted(n for n in expected if n in left) and left)
            found = digests(work)
            unequal = sorted(n for n in expected if found.get(n) != expected[n])
            debris = sorted(n for n in found if n not in expected)
            fine = (status == 0 or complete) and not unequal and not debris
            entry = {"number": number, "command": name, "seconds": round(seconds, 2), "after": round(after, 3)}
            entry.update(killed=True, kills=kills, left=left, rerun=status, unequal=unequal, debris=debris, fine=fine)
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            entries.append(entry)
            if not fine:
                print(entry, file=sys.stderr)
                if args.keep is not None:
                    shutil.copytree(work, args.keep / str(number), dirs_exist_ok=True)
    print(Counter((entry["command"], entry["fine"]) for entry in entries), sum(e["killed"] for e in entries), "killed")


if __name__ == "__main__":
    main()
