"""Check the numbers of README, docs, studies and recipes against the logs: python studies/check_numbers.py

``figures.yaml`` has, by document, sentences and rows of tables with expressions where the numbers are. They are found
in the document, whatever stands there for a number, and each number is compared with what the logs give. Tables between
``<!-- NAME -->`` and ``<!-- end of NAME -->`` are written by a study's table script, and must be what it writes today.
Whatever else looks like a measurement (decimals, thousands, percentages, ×, ±, seconds, bytes) must be named under
``allow``, with the reason why no log has it.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))

from pages import with_sections

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "studies" / "figures.yaml"
TABLE_SCRIPTS = [*sorted(ROOT.glob("studies/*/*table.py")), ROOT / "studies/scale/paper.py"]
NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:e-?\d+)?"
UNIT = r"\s?(?:%|×(?!\s?[\d(])|±|x\b|s\b|ms\b|µs\b|[MG]B\b|min\b|minutes\b|hours?\b|points?\b|times\b)"
PLACE = re.compile(r"\{([^{}]+?)(?::([^{}:]*))?\}")


@dataclass(frozen=True)
class Fault:
    """``number`` is what stands at ``line`` of ``document``, 0 if it could not be found there."""

    document: str
    line: int
    number: str
    why: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}: {self.number}: {self.why}"


def documents() -> list[str]:
    patterns = ("README.md", "docs/**/*.md", "studies/*/README.md", "src/tensorfold/recipes/*.yaml")
    return sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern))


# The logs, as names for the expressions.


class Entry(SimpleNamespace):
    """A line of a log, or a part of one: ``entry.perplexity.wikitext_2_test``."""


class Group(list[Any]):
    """Lines that differ in the seed: an attribute is the list of theirs."""

    def __getattr__(self, name: str) -> Group:
        return Group(getattr(each, name) for each in self)


def named(key: Any) -> str:
    """As an attribute: what is no letter and no digit becomes ``_``, and what begins with a digit begins with one."""
    name = re.sub(r"\W+", "_", str(key)).strip("_")
    return f"_{name}" if name[:1].isdigit() else name


def wrapped(value: Any) -> Any:
    if isinstance(value, dict):
        return Entry(**{named(key): wrapped(each) for key, each in value.items()})
    return value


def lines(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]


def log(file: str, key: str | list[str] = (), group: bool = False) -> Any:
    """A log's lines by their keys, joined with ``_``; without a key its only line, or all of them."""
    keys = [key] if isinstance(key, str) else list(key)
    read = lines(file)
    if not keys:
        return wrapped(read[0]) if len(read) == 1 else Group(map(wrapped, read))
    found: dict[str, Any] = {}
    for line in read:
        name = named("_".join(str(line[each]) for each in keys if each in line))
        if group:
            found.setdefault(name, Group()).append(wrapped(line))
        else:
            found[name] = wrapped(line)
    return Entry(**found)


def wiki(entry: Any) -> float:
    """Perplexity of wikitext-2-test."""
    return float(getattr(getattr(entry, "perplexity", entry), "wikitext_2_test", None) or entry.wikitext_2.perplexity)


def shake(entry: Any) -> float:
    """Perplexity of Tiny Shakespeare."""
    where = getattr(entry, "perplexity", entry).tinyshakespeare
    return float(getattr(where, "perplexity", where))


def part(text: str, index: int) -> float:
    """One of the numbers in a string of a log, such as "1.58 (1.58–1.62)"."""
    return float(re.findall(r"[\d.]+", text)[index])


def before(group: Group) -> float:
    """Mean perplexity of the Krony study's held-out text, before healing."""
    return statistics.mean(group.before.held_out)


def after(group: Group) -> float:
    return statistics.mean(group.after.held_out)


def spread(group: Group) -> float:
    """Standard deviation over seeds after healing."""
    return statistics.stdev(group.after.held_out)


def loss(group: Group) -> float:
    return statistics.mean(group.after.loss)


def accuracy(group: Group) -> float:
    """Mean, per cent."""
    return 100 * statistics.mean(group.after.accuracy)


def shares(group: Group) -> list[float]:
    """Per cent of the accuracy of the dense PicoGPT: that of the run itself, or of the same schedule and seed."""
    dense = {run.seed: run.after.accuracy for run in getattr(names()["pico"], f"{group[0].schedule}_dense_0_random")}
    return [
        100 * run.after.accuracy / (run.dense.accuracy if hasattr(run, "dense") else dense[run.seed])
        for run in group
        if hasattr(run, "dense") or run.seed in dense
    ]


def smaller(run: Any) -> float:
    """How many times smaller than SmolLM2's table a table is."""
    return float(names()["table"].dense_1x_plain.table_parameters / run.table_parameters)


def speeds(layers: list[Any]) -> list[float]:
    """Times as fast as the dense layer, for every number of tokens."""
    return [point["speedup"]["dense"]["median"] for layer in layers for point in layer.tokens]


def speed(layer: Any, tokens: int) -> float:
    """Times as fast as the dense layer, for this many tokens."""
    return speeds([layer])[[point["tokens"] for point in layer.tokens].index(tokens)]


def floor_cost(entry: Any, other: Any, stretch: int) -> float:
    """How much larger the perplexity is than the other's, in per cent, on the third or the last quarter."""
    mine, theirs = (list(vars(each.perplexity).values())[stretch] for each in (entry, other))
    return 100 * (mine / theirs - 1)


BUILTINS = (abs, getattr, hasattr, int, isinstance, len, max, min, round, str, sum, vars, sorted)
HELPERS: dict[str, Any] = {
    "mean": statistics.mean, "log": math.log, "wiki": wiki, "shake": shake, "part": part, "before": before,
    "after": after, "spread": spread, "loss": loss, "accuracy": accuracy, "smaller": smaller, "speeds": speeds,
    "speed": speed, "floor_cost": floor_cost, "named": named,
    "share": lambda group: statistics.mean(shares(group)),
    "share_spread": lambda group: statistics.stdev(shares(group)),
    **{each.__name__: each for each in BUILTINS},
}  # fmt: skip


@cache
def figures() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(FIGURES.read_text(encoding="utf-8"))
    return read


@cache
def names() -> dict[str, Any]:
    scope = HELPERS | {name: log(**given) for name, given in figures()["logs"].items()}
    for name, expression in figures()["names"].items():
        scope[name] = evaluated(expression, scope)
    return scope


def evaluated(expression: str, scope: dict[str, Any]) -> Any:
    return eval(expression, {"__builtins__": {}, **scope})


def formatted(value: Any, form: str) -> str:
    """By Python's format; ``..3f`` is ``.3f`` without the zero before the point; exponents without zeros too."""
    if form.startswith(".."):
        return format(value, form[1:]).removeprefix("0")
    return re.sub(r"e([+-])0*", r"e\1", format(value, form))


# What stands in a document.


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blanked(document: str, text: str) -> str:
    """Prose and tables without code, links' targets and generated sections; of a recipe, its comments.

    What is left stands where it stood.
    """
    code = (r"(?m)^[^#\n]*", r"(?m)^# +(?:tensorfold .*)$") if document.endswith(".yaml") else ()
    for pattern in (
        *code,
        r"(?ms)^```.*?^```",
        r"(?s)<!-- ([\w -]+) -->.*?<!-- end of \1 -->",
        r"(?m)^    .*$",
        r"``[^`]*``|`[^`]*`",
        r"\]\([^)\s]*\)",
        r"arXiv [\d., ]+\d",
    ):
        text = re.sub(pattern, lambda match: re.sub(r"\S", " ", match.group()), text)
    return text


def measurements(document: str, text: str) -> Iterator[tuple[int, int]]:
    """Where numbers stand that look measured."""
    for match in re.finditer(rf"(?<![\w.,/^-]){NUMBER}(?![\w^])", blanked(document, text)):
        number = match.group()
        before, after = text[: match.start()], text[match.end() :]
        if number and (re.search("[.,e]", number) or re.match(UNIT, after) or re.search(r"±\s?$", before)):
            yield match.span()


def line_of(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1


def pattern_of(sentence: str) -> tuple[re.Pattern[str], list[tuple[str, str]]]:
    """What finds the sentence, with a group for each of its (expression, format)."""
    out, end, places = "", 0, []
    for match in PLACE.finditer(sentence):
        out += literal(sentence[end : match.start()]) + r"(\d[\d.,]*(?:e-?\d+)?(?<![.,])|\.\d+)"
        places.append((match[1], match[2] or ""))
        end = match.end()
    return re.compile(out + literal(sentence[end:])), places


def literal(text: str) -> str:
    return re.sub(r"(?:\\?\s)+", r"\\s+", re.escape(text))


def check_sentences(document: str) -> tuple[list[Fault], list[tuple[int, int]]]:
    """Faults of the document's sentences, and where the numbers are that were compared."""
    text, faults, bound = text_of(document), [], []
    for sentence in figures()["documents"].get(document, ()):
        pattern, places = pattern_of(sentence)
        found = list(pattern.finditer(text))
        if len(found) != 1:
            why = f"found {len(found)} times, needed once; put figures.yaml right."
            faults.append(Fault(document, line_of(text, found[1].start()) if found else 0, repr(sentence), why))
        for match in found:
            for index, (expression, form) in enumerate(places, 1):
                bound.append(match.span(index))
                try:
                    value = formatted(evaluated(expression, names()), form)
                except (AttributeError, LookupError, TypeError) as error:
                    value = f"nothing for {expression} ({error})"
                if match[index] != value:
                    why = f"the log gives {value} ({expression})"
                    faults.append(Fault(document, line_of(text, match.start(index)), match[index], why))
    return faults, bound


def meant(where: str | list[str]) -> list[str]:
    """The documents of an entry of ``allow``."""
    if where in ("any", "recipes"):
        return [document for document in documents() if where == "any" or document.endswith(".yaml")]
    return [where] if isinstance(where, str) else where


def check_rest(document: str, bound: list[tuple[int, int]]) -> list[Fault]:
    """Numbers that look measured and are neither compared nor allowed."""
    text = text_of(document)
    covered = list(bound)
    for entry in figures()["allow"]:
        if document in meant(entry["in"]):
            for each in entry["text"]:
                covered += [match.span() for match in re.finditer(each.replace(" ", r"\s+"), text)]
    return [
        Fault(document, line_of(text, start), text[start:end], "no log gives it; bind it or allow it in figures.yaml.")
        for start, end in measurements(document, text)
        if not any(first <= start and end <= last for first, last in covered)
    ]


def check_sections(script: Path) -> list[Fault]:
    """The first line of a generated section that the script writes differently now."""
    spec = spec_from_file_location(f"{script.parent.name}_{script.stem}", script)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look there for the names in their annotations
    spec.loader.exec_module(module)
    name = script.parent.relative_to(ROOT).as_posix() + "/README.md"
    now, then = with_sections(ROOT / name, module.sections()).splitlines(), text_of(name).splitlines()
    different = (line for line in range(max(len(now), len(then))) if now[line : line + 1] != then[line : line + 1])
    return [
        Fault(name, line + 1, "".join(then[line : line + 1]), f"{script.name} writes: {''.join(now[line : line + 1])}")
        for line in different
    ][:1]


def check() -> list[Fault]:
    faults = []
    for document in documents():
        of_sentences, bound = check_sentences(document)
        faults += of_sentences + check_rest(document, bound)
    return faults + [fault for script in TABLE_SCRIPTS for fault in check_sections(script)]


def main() -> None:
    faults = check()
    print(*faults, sep="\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
