"""Kill a healing run ten times at random moments and compare its weights with those of a run that was left alone.

    python studies/heal/kills.py DIR --teacher MODEL --train TEXT --out studies/heal/kills.jsonl -- --steps 60 --batch 4

What follows ``--`` goes to ``tensorfold heal``. Each line that is appended to the file is one experiment: when each
kill came, how many lines the log had then, and whether weights and log came out equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def command(args: argparse.Namespace, out: Path) -> list[str]:
    teacher = ["--teacher", args.teacher] if args.teacher else []
    base = [sys.executable, "-m", "tensorfold", "heal", args.model, "--train", args.train, *teacher]
    return [*base, "--out", str(out), *args.rest]


def lines(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def digest(directory: Path) -> str:
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def left_alone(args: argparse.Namespace, out: Path) -> tuple[float, int]:
    """Seconds from the first log line to the end of a run that nobody kills, and how many lines there are."""
    process = subprocess.Popen(command(args, out), stdout=subprocess.DEVNULL)
    while process.poll() is None and not lines(out.with_name(f"{out.name}.heal") / "log.jsonl"):
        time.sleep(0.005)
    started = time.monotonic()
    if process.wait():
        raise SystemExit("the command fails without being killed")
    return time.monotonic() - started, lines(out / "heal.jsonl")


def killed_once(args: argparse.Namespace, out: Path, seconds: float) -> dict[str, int | float | bool]:
    """Start the command, SIGKILL it after ``seconds`` of having written to its log, and say how far it was."""
    log = out.with_name(f"{out.name}.heal") / "log.jsonl"
    begun = lines(log)
    process = subprocess.Popen(command(args, out), stdout=subprocess.DEVNULL)
    while process.poll() is None and lines(log) <= begun:
        time.sleep(0.005)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return {"after_s": round(seconds, 2), "killed": process.returncode == -9, "lines": lines(log)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--train", required=True)
    parser.add_argument("--teacher")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("kills.jsonl"))
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:at])
    args.rest = sys.argv[at + 1 :]
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        whole, broken = Path(scratch) / "whole", Path(scratch) / "broken"
        seconds, total = left_alone(args, whole)
        kills = []
        # Short enough for all of them to fit into the run, most times.
        while len(kills) < args.kills and not broken.exists():
            kills.append(killed_once(args, broken, moments.uniform(0, 1.5 * seconds / args.kills)))
        subprocess.run(command(args, broken), check=True, stdout=subprocess.DEVNULL)
        result = {
            "model": Path(args.model).name,
            "options": args.rest,
            "seconds": round(seconds, 1),
            "lines": total,
            "kills": kills,
            "killed": sum(bool(kill["killed"]) for kill in kills),
            "equal_weights": digest(whole) == digest(broken),
            "equal_log": lines(whole / "heal.jsonl") == lines(broken / "heal.jsonl"),
            "threads": os.environ.get("OMP_NUM_THREADS"),
        }
    with args.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    print(json.dumps(result, indent=1))
    raise SystemExit(not (result["equal_weights"] and result["equal_log"]))


if __name__ == "__main__":
    main()
