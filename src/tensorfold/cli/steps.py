"""Steps of ``compress``: each is done once, known again by its fingerprint, and done anew where a setting changed."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensorfold.errors import pass_on_memory
from tensorfold.utils.atomic_files import write_file
from tensorfold.utils.fingerprints import hash_file, hash_json
from tensorfold.utils.records import EVALUATIONS

RECORDS = ".steps"  # in the directory of a run: a file a step

Settings = Mapping[str, Any]


class Steps:
    """Steps of one run in its directory.

    A step has a key, the hash of its settings, in which stand the keys of the steps that it builds on. The key is
    written down before the step begins and its output appears whole or not at all, so that an output beside the same
    key is the step's, whenever the run was killed. Once it is done, the hashes of the output's files are noted too.

    Attributes:
        keys: Keys of the steps so far, by name.
    """

    def __init__(self, directory: Path, names: list[str]) -> None:
        self.directory, self.names = directory, names
        self.keys: dict[str, str] = {}
        self._expected: dict[str, float] = {}

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Say how long steps are expected to take, for the time that is left."""
        self._expected.update(seconds)

    def run(
        self,
        name: str,
        what: str,
        settings: Settings,
        work: Callable[[], Any],
        output: Path | None = None,
        read: Callable[[], Any] | None = None,
    ) -> Any:
        """Do a step, unless it is done; return its result, a JSON value.

        Args:
            name: One of the names that the run has.
            what: The step in words, for standard error.
            settings: Everything that decides its result, as JSON values.
            work: Does the step. Its result is the step's, unless there is ``read``.
            output: File or directory that the step writes whole or not at all; None where it writes nothing.
            read: Reads the result from the output.
        """
        settings = json.loads(json.dumps(settings))
        key = self.keys[name] = hash_json(settings)
        record = self._record(name)
        why = self._why_anew(name, record, key, settings, output)
        if why is None and record.get("done"):
            self._say(name, f"{what}: done before")
            return record["result"]
        self._say(name, what + (f", anew: {why}" if why else ""))
        started = time.monotonic()
        if record.get("key") != key or why is not None:
            if output is not None:
                for path in (output, *(Path(f"{output}.{kind}") for kind in ("fold", "heal"))):
                    _remove(path, keep=path != output and why is None)
            self._write(name, {"key": key, "settings": settings})
        result = work() if output is None or not output.exists() else None
        result = result if read is None else read()
        seconds = round(time.monotonic() - started, 3)
        done = {"done": True, "result": result, "files": _hashes(output), "seconds": seconds}
        self._write(name, {"key": key, "settings": settings, **done})
        return result

    @property
    def times(self) -> dict[str, float]:
        """Seconds that every step took, in whichever run it was done."""
        return {name: float(self._record(name).get("seconds", 0.0)) for name in self.keys}

    @property
    def seconds(self) -> float:
        """Seconds that all steps took together."""
        return sum(self.times.values())

    def _record(self, name: str) -> dict[str, Any]:
        """What is written down of a step; nothing where it never began, or the record is damaged."""
        try:
            record = json.loads((self.directory / RECORDS / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            pass_on_memory(error)
            return {}
        return record if isinstance(record, dict) else {}

    def _write(self, name: str, record: Settings) -> None:
        write_file(self.directory / RECORDS / f"{name}.json", (json.dumps(record, indent=1) + "\n").encode())

    def _why_anew(self, name: str, record: Settings, key: str, settings: Settings, output: Path | None) -> str | None:
        """The reason why what is there of a step cannot be used; None where it can, or nothing is there."""
        if not record:
            return f"{output} is not of this run" if output is not None and output.exists() else None
        if record.get("key") != key:
            return _difference(record.get("settings", {}), settings)
        if record.get("done") and _hashes(output) != record.get("files"):
            return f"the files in {output} changed since" if output and output.exists() else f"{output} is gone"
        return None

    def _say(self, name: str, words: str) -> None:
        place = self.names.index(name)
        left = [self._expected.get(each) for each in self.names[place:]]
        known = all(seconds is not None for seconds in left)
        after = (
            f" (about {_minutes(sum(filter(None, left)))} left)" if known else " (time left is known a step or two on)"
        )
        after = "" if "done before" in words else after
        print(f"[{place + 1}/{len(self.names)}] {words}{after}", file=sys.stderr, flush=True)


def _minutes(seconds: float) -> str:
    return f"{max(1, round(seconds))} s" if seconds < 90 else f"{round(seconds / 60)} min"


def _difference(before: Settings, now: Settings) -> str:
    """The first difference between the settings of a step then and now, in words."""
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if old != new:
            if key == "after":
                return "a step before it was done anew"
            readable = all(not isinstance(each, dict | list) and len(str(each)) < 60 for each in (old, new))
            return f"{key} was {old}, is {new}" if readable else f"{key} changed"
    return "its record is damaged"


def _hashes(output: Path | None) -> dict[str, str]:
    """SHA-256 of the files of an output, by their names; evaluations are recorded in it later."""
    if output is None or not output.exists():
        return {}
    files = [output] if output.is_file() else sorted(path for path in output.rglob("*") if path.is_file())
    return {path.relative_to(output.parent).as_posix(): hash_file(path) for path in files if path.name != EVALUATIONS}


def _remove(path: Path, keep: bool) -> None:
    if keep:
        return
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
