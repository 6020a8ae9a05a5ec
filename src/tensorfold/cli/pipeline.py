"""The steps of ``compress`` in their order: what each is given, what it writes, and what is measured of it."""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tensorfold.cli.outcome import Outcome, Row
from tensorfold.cli.output import quietly
from tensorfold.cli.sizes import COSTS, Aim, aim_at, targets_of_size
from tensorfold.cli.steps import RECORDS, Steps
from tensorfold.cli.texts import CALIBRATION, HELD_OUT, UNSEEN, check_texts, hashes_of, write_texts
from tensorfold.utils.atomic_files import check_target, write_file
from tensorfold.utils.claims import claimed
from tensorfold.utils.devices import one_device
from tensorfold.utils.records import EVALUATIONS, read_lines, read_object, record_evaluation

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from tensorfold.export.kept_graphs import KeptGraphs
    from tensorfold.recipes.recipe import Recipe

RESULT = "compress.json"
_FOLD_PASSES = 25  # forward passes over the calibration text that take as long as a fold, about
_EXPORT = 1.5  # seconds a block, about
_ROUNDS, _PROMPT, _DECODED = 5, 512, 32  # of the measurement of speed
PROMPT = "The most important thing about a good tool is"  # that every row goes on from, side by side
_SAMPLED = 48  # tokens of it


@dataclass(frozen=True)
class Order:
    """What is asked for.

    Attributes:
        model: Name of the dense model.
        size: Fraction of its parameters that stays; or None, and ``most`` are the bytes that the result may have.
        texts: Texts to calibrate and heal on.
        unseen: Text to judge by besides.
        minutes: Of healing.
        engine: What the result is to run in.
        bits: Of a stored number; None to choose.
        plain: Whether only MLPs become narrower.
        effort: How much time calibration takes.
        tokens: Of calibration text.
        judged: Tokens of each text that is judged by.
        targets: What is folded, as ``fold --targets`` takes it; None for every linear layer, and experts where they can
            be, or the MLPs if ``plain``.
        device: Where models compute; the CPU if None. Graphs are written by the CPU, and run there.
    """

    model: str
    size: float | None
    most: int | None
    texts: tuple[str, ...]
    unseen: str
    minutes: float
    engine: str
    bits: int | None
    plain: bool
    effort: str
    tokens: int
    judged: int
    targets: str | None = None
    device: str | None = None

    def recipe(self, config: PreTrainedConfig) -> Recipe:
        """The fold of a dense model, at a size that is still to be found."""
        from tensorfold.recipes.recipe import Recipe

        targets = self.targets or targets_of_size(config, self.engine, self.plain)
        return Recipe.keep(0.5, targets, self.effort, self.plain)


class Pipeline:
    """One run of ``compress`` in its directory.

    Args:
        order: What is asked for.
        out: Directory of the run: an empty one, a new one, or that of an earlier run.
    """

    def __init__(self, order: Order, out: Path) -> None:
        from tensorfold.export.engine_model import find_runnable
        from tensorfold.healing.device import check_training

        one_device(order.device, "models are compared on one device")
        if order.minutes:
            check_training(order.device)
        self.order, self.out = order, out
        if not (out / RECORDS).is_dir():
            check_target(out)
        check_texts(order.texts, order.unseen)
        if order.engine != "transformers":
            from tensorfold.export.tracing import check_packages

            check_packages(order.engine)
        self.source = find_runnable(order.model)
        config = self.source.config()
        self.recipe = order.recipe(config)
        self.aim: Aim = aim_at(config, self.recipe, order.engine, order.bits, order.size, order.most)
        beside = {self.aim.bits, *(bits for bits in (8, 4) if bits in COSTS[order.engine])}
        self.bits = sorted(beside - {32}, reverse=True)  # that the dense model is judged in
        exports = [f"dense-{bits}" for bits in self.bits]
        heal = ["heal"] if order.minutes else []
        finish = [] if self.last_is_result else ["export"]
        judge = [f"judge-{name}" for name in (*exports, *([] if self.last_is_result else ["folded"]), "result")]
        names = ["texts", "judge-dense", "fold", *heal, *finish, *exports, *judge, "speed", "samples", "report"]
        self.steps = Steps(out, names)
        self.progress = sys.stderr.isatty()
        self._pace = 100.0  # tokens a second that the dense model was judged at

    @property
    def last_is_result(self) -> bool:
        """Whether the folded or healed directory is the result, and nothing is exported."""
        return self.order.engine == "transformers" and self.aim.bits == 32

    @cached_property
    def dense(self) -> PreTrainedModel:
        """The dense model."""
        return self.source.model(device=self.order.device)

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self.source.tokenizer()

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides every step: the dense model and the version of this package."""
        from tensorfold import __version__
        from tensorfold.utils.fingerprints import hash_model

        return {"model": hash_model(self.dense), "tensorfold": __version__}

    def run(self) -> Outcome:
        """Do all steps, or those that are not done; return the outcome.

        Raises:
            InputError: Model, texts or sizes cannot be used, or the directory is something else's.
            TensorfoldError: Another process is at work in it, or the disk is full.
        """
        from tensorfold.export.kept_graphs import KeptGraphs

        print(f"{self.order.model}\n{self.aim}", file=sys.stderr, flush=True)
        with claimed(self.out, "choose another --out"):
            self._texts()
            rows = [self._row("dense", self.order.model, "judge-dense", [])]
            self._expect(rows[0])
            last = self._heal(self._fold())
            result = last if self.last_is_result else self._export("export", last, self.out / "exported", self.aim.bits)
            with KeptGraphs(self.out / RECORDS / "graphs") as kept:
                dense = [
                    self._export(f"dense-{b}", self.order.model, self.out / f"dense-{b}", b, kept) for b in self.bits
                ]
            for name, bits, path in zip((f"dense-{b}" for b in self.bits), self.bits, dense, strict=True):
                rows.append(self._row(f"dense, {bits} bits", str(path), f"judge-{name}", [name]))
            made = ["fold", *(["heal"] if self.order.minutes else [])]
            what = " and ".join({"fold": "folded", "heal": "healed"}[each] for each in made)
            if not self.last_is_result:
                rows.append(self._row(what, str(last), "judge-folded", made, ours=True))
                what = f"{what}, {self.aim.bits} bits"
            after = made if self.last_is_result else ["export"]
            rows.append(self._row(what, str(result), "judge-result", after, ours=True))
            rows = self._speed(rows)
            return self._report(rows, self._samples(rows), last)

    def _texts(self) -> None:
        order, folder = self.order, self.out / "text"

        def work() -> None:
            write_texts(
                folder, order.texts, order.unseen, self.dense, self.tokenizer, order.tokens, order.judged, self.progress
            )

        settings = {
            **self.identity, "texts": list(order.texts), "unseen": order.unseen, "tokens": order.tokens,
            "judged": order.judged, "contents": hashes_of(order.texts),
        }  # fmt: skip
        names = " and ".join((*order.texts, f"unseen {order.unseen}"))
        self.steps.run("texts", f"texts: {names}", settings, work, folder)

    def _file(self, part: str) -> str:
        return str(self.out / "text" / f"{part}.jsonl")

    def _fold(self) -> Path:
        from tensorfold.cli.fold import fold

        target, file = self.out / "folded", self.out / "recipe.yaml"
        [rule] = self.recipe.fold
        entry = {
            "targets": rule.targets,
            "method": "auto",
            "keep": round(self.aim.keep, 6),
            "effort": self.order.effort,
        }
        entry |= {"plain": True} if self.order.plain else {}
        recipe = {"fold": [entry], "calibrate": {"text": self._file(CALIBRATION), "tokens": self.order.tokens}}

        def work() -> None:
            write_file(file, yaml.safe_dump(recipe, sort_keys=False).encode())
            quietly(fold, model=self.order.model, recipe=str(file), out=target, device=self.order.device)

        settings = {**self.identity, "after": [self.steps.keys["texts"]], **entry, "tokens": self.order.tokens}
        what = f"fold: tensorfold fold {self.order.model} --recipe {file} --out {target}"
        self.steps.run("fold", what, settings, work, target)
        return target

    def _heal(self, folded: Path) -> Path:
        if not self.order.minutes:
            return folded
        from tensorfold.calibration.own_text import SELF
        from tensorfold.cli.heal import heal
        from tensorfold.cli.minutes import heal_options

        target = self.out / "healed"
        train = [SELF if text == SELF else text for text in self.order.texts]
        held = any(text != SELF for text in train)
        given = [self._file(CALIBRATION)] if held else [SELF]
        options = heal_options(self.dense, folded, self.order.minutes, self.steps.keys["fold"])

        def work() -> None:
            if options is None:  # too few steps to do anything
                shutil.copytree(folded, target)
                return
            set_ = [f"{key}={value}" for key, value in options["set"].items()]
            plain = {key: value for key, value in options.items() if key != "set"}
            plain["device"] = self.order.device
            quietly(heal, model=str(folded), train=given, teacher=self.order.model, out=target, set_=set_, **plain)

        settings = {
            "after": [self.steps.keys["fold"]],
            "minutes": self.order.minutes,
            "options": options,
            "train": given,
        }
        steps = (
            "no steps fit" if options is None else f"{options['steps']} steps of {options['batch']}×{options['block']}"
        )
        what = f"heal: {steps} in {self.order.minutes:g} minutes, to {target}"
        self.steps.run("heal", what, settings, work, target)
        return target

    def _export(self, name: str, source: str | Path, target: Path, bits: int, kept: KeptGraphs | None = None) -> Path:
        from tensorfold.cli.export import Bits, Target, export_model

        graph = self.order.engine != "transformers"
        to = Target(self.order.engine if graph else "int8")

        def work() -> None:
            export_model(str(source), to, target, Bits(str(bits)) if graph else None, kept=kept if graph else None)

        before = ["heal" if self.order.minutes else "fold"] if name == "export" else []
        settings = {**self.identity, "after": [self.steps.keys[each] for each in before], "to": to.value, "bits": bits}
        shown = f" --bits {bits}" if graph else ""
        what = f"export: tensorfold export {source} --to {to.value}{shown} --out {target}"
        self.steps.run(name, what, settings, work, target)
        return target

    def _runnable(self, path: str, alone: bool = True, dtype: str | None = None) -> PreTrainedModel:
        """A model of the run on the run's device; a graph, and what is compared with graphs, on the CPU."""
        from tensorfold.export.engine_model import find_runnable, is_exported

        there = not is_exported(path) if alone else self.order.engine == "transformers"
        return find_runnable(path).model(dtype, self.order.device if there else None)

    def _row(self, name: str, path: str, step: str, after: list[str], ours: bool = False) -> Row:
        from tensorfold.data.texts import load_text
        from tensorfold.evaluation.perplexity import evaluate
        from tensorfold.models.anatomy import context_length
        from tensorfold.models.sizes import stored_bytes, stored_parameters

        limit = context_length(self.source.config())
        protocol = "hf-1024" if limit is None or limit >= 1024 else f"disjoint-{limit}"

        def work() -> dict[str, Any]:
            model = self.dense if step == "judge-dense" else self._runnable(path)
            found: dict[str, Any] = {"parameters": stored_parameters(model), "bytes": stored_bytes(model)}
            for part, label in ((HELD_OUT, self.own_label), (UNSEEN, self.unseen_label)):
                result = evaluate(
                    model, self.tokenizer, load_text(self._file(part)), protocol, max_tokens=self.order.judged,
                    text_name=label,
                )  # fmt: skip
                found[part] = result.to_dict()
                if ours:
                    _record(path, result.to_dict())
            return found

        keys = [self.steps.keys[each] for each in (*after, "texts")]
        settings = {**self.identity, "after": keys, "protocol": protocol, "judged": self.order.judged}
        found = self.steps.run(step, f"judge: {name}", settings, work)
        own, unseen = found[HELD_OUT], found[UNSEEN]
        self._pace = own["tokens"] / max(1e-3, own["seconds"]) if step == "judge-dense" else self._pace
        return Row(
            name, path, ours, found["parameters"], found["bytes"], own["perplexity"], unseen["perplexity"],
            seen=max((each["share"] for each in (*own["seen"], *unseen["seen"]) if ours), default=0.0),
            tokens=own["tokens"], protocol=protocol,
        )  # fmt: skip

    @property
    def own_label(self) -> str:
        """Name of the held-out text in results."""
        return f"{' + '.join(Path(text).name for text in self.order.texts)} (held out)"

    @property
    def unseen_label(self) -> str:
        """Name of the unseen text in results."""
        return f"{Path(self.order.unseen).name} (unseen)"

    def _expect(self, dense: Row) -> None:
        """Say how long steps take, from the time that the dense model took for the text that it was judged by."""
        blocks = getattr(self.source.config().get_text_config(decoder=True), "num_hidden_layers", 12)
        judge = 2 * dense.tokens / self._pace
        speed = _ROUNDS * (len(self.bits) + 2) * (_PROMPT / self._pace + _DECODED * 0.05)
        expected = dict.fromkeys(self.steps.names, judge)
        expected |= {name: _EXPORT * blocks for name in self.steps.names if name.startswith(("dense-", "export"))}
        expected |= {"fold": _FOLD_PASSES * self.order.tokens / self._pace, "heal": 60 * self.order.minutes}
        self.steps.expect({**expected, "speed": speed, "samples": 2.0 * (len(self.bits) + 2), "report": 5.0})

    def _speed(self, rows: list[Row]) -> list[Row]:
        from tensorfold.benchmark.whole import bench_models, prompt_length

        types = {row.name: self._timed_in(row.path) for row in rows}

        def work() -> dict[str, Any]:
            models = {row.name: self._runnable(row.path, False, types[row.name] or None) for row in rows}
            prompt = prompt_length(list(models.values()), None, _DECODED)
            prefill, decode = bench_models(models, {}, prompt, _DECODED, _ROUNDS, time.perf_counter, lambda: None)
            return {
                "tokens": prompt,
                "prompt": prefill.tokens_per_second,
                "decode": decode.tokens_per_second if decode is not None else {},
            }

        keys = [self.steps.keys[name] for name in self.steps.names if name.startswith(("judge", "dense"))]
        settings = {"after": keys, "types": types}
        found = self.steps.run("speed", "speed: prompts and steps of every row, in turn", settings, work)
        return [row.timed(found["prompt"][row.name], found["decode"].get(row.name), types[row.name]) for row in rows]

    def _timed_in(self, path: str) -> str:
        """What a graph computes in when nobody says otherwise; empty for what is no graph."""
        from tensorfold.export.engine_model import engine_dtype, is_exported

        return str(engine_dtype(self.order.engine)).removeprefix("torch.") if is_exported(path) else ""

    def _samples(self, rows: list[Row]) -> list[dict[str, Any]]:
        from tensorfold.report.samples import sample_of

        def work() -> list[dict[str, Any]]:
            models = ((row.name, self._runnable(row.path)) for row in rows)
            return [asdict(sample_of(*each, self.tokenizer, PROMPT, _SAMPLED)) for each in models]

        keys = [self.steps.keys[name] for name in self.steps.names if name.startswith(("judge", "dense"))]
        settings = {"after": keys, "prompt": PROMPT, "tokens": _SAMPLED}
        found: list[dict[str, Any]] = self.steps.run("samples", f"samples: {PROMPT} …", settings, work)
        return found

    def _report(self, rows: list[Row], samples: list[dict[str, Any]], last: Path) -> Outcome:
        from tensorfold.report.page import PACKAGES, missing_packages, write_report

        page, order = self.out / "report.html", asdict(self.order)
        drawn = not missing_packages()
        outcome = Outcome(
            order=order, aim=self.aim.to_dict(), rows=rows, own=self.own_label, unseen=self.unseen_label,
            prompt=PROMPT, samples=samples, out=str(self.out), report=str(page) if drawn else None,
        )  # fmt: skip

        def work() -> None:
            if drawn:
                dense = Path(self.source.path)
                shown = [*([dense] if dense.is_dir() else []), last]
                write_report(shown, page, progress=self.progress, outcome=outcome.to_dict())
            else:
                print(
                    f"no report: it needs {' and '.join(PACKAGES)}; pip install 'tensorfold[report]'", file=sys.stderr
                )

        keys = [self.steps.keys[name] for name in self.steps.names if name in self.steps.keys]
        self.steps.run("report", f"report: {page}", {"after": keys, "drawn": drawn}, work, page if drawn else None)
        done = read_object(self.out / RESULT) or {}
        if done.get("rows") != outcome.to_dict()["rows"]:
            write_file(self.out / RESULT, (json.dumps(outcome.to_dict(), indent=1) + "\n").encode())
        return outcome


def _record(path: str, result: dict[str, Any]) -> None:
    """Record an evaluation for reports, unless a run that was killed has recorded it."""
    known, _ = read_lines(Path(path) / EVALUATIONS)
    timeless = {key: value for key, value in result.items() if key != "seconds"}
    if not any(timeless == {key: each.get(key) for key in timeless} for each in known):
        record_evaluation(path, result)
