"""The MPO study on Tiny Shakespeare: the dense PicoGPT, its MPO forms and their rivals, trained and healed.

    python studies/picogpt/run.py --work WORK [--jobs 2] [--only PATTERN] [--quick]
    python studies/picogpt/table.py

A run is a model, a start, a schedule and a seed. Each appends one line to ``runs.jsonl`` and leaves its thinned log in
``logs/``; a run that is there already is skipped, and one that was interrupted goes on from its last checkpoint.
Dense models lie in WORK, because the runs that start from one fold it; one that is missing is trained again.

Text: the first 90 % train, the last 10 % (435 windows of 256 characters) validate and choose nothing: every run keeps
the weights of its last step. What was tuned, was tuned inside the first 90 % (``tune.py``).
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modes import bond_for, recipe

HERE = Path(__file__).parent
RUNS, LOGS = HERE / "runs.jsonl", HERE / "logs"
STEPS, HEALING_STEPS = 2000, 500  # a quarter
COMMON: dict[str, Any] = {
    "batch": 32, "block": 256, "windows": "random", "validation_fraction": 0.1, "select": "last",
    "weight_decay": 0.1, "betas": (0.9, 0.95), "clip": 1.0, "schedule": "cosine", "precision": "bf16",
}  # fmt: skip
# Settings of healing, and of the dense model's configuration.
SCHEDULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "paper": ({"lr": 3e-4, "warmup": 100}, {}),
    "tuned": ({"lr": 1e-2, "warmup": 100}, {"embedding_std": 1.0}),
}
HEALING: dict[str, Any] = {"kl": 1.0, "warmup": 20}
FAST = 2e-2  # learning rate; of six for healing the best, found when the runs at the schedule's own 1e-2 were done
CALIBRATION = 65_536  # characters from the start of the training text
CHI = {4: 42_336, 8: 79_168, 16: 177_408, 32: 472_192}


@dataclasses.dataclass(frozen=True)
class Run:
    """``system``: dense, mpo, mpo2, mpo3, low-rank, kronecker or layers; ``size``: χ, parameters or layers.

    ``start``: random; fold, from the trained dense model; fold-fast, the same healed at ``FAST``; fold-long, so for all
    steps; fold-calibrated and fold-calibrated-long, as these two, each matrix fitted in the metric of its inputs.
    """

    system: str
    size: int
    start: str
    schedule: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.schedule}-{self.system}-{self.size}-{self.start}-{self.seed}"

    @property
    def calibrated(self) -> bool:
        return "calibrated" in self.start

    @property
    def long(self) -> bool:
        return self.start.endswith("-long")

    @property
    def dense(self) -> Run:
        return Run("dense", 0, "random", self.schedule, self.seed)


def planned() -> Iterator[Run]:
    """All runs, what others build on and what decides first."""
    for schedule in ("tuned", "paper"):
        yield Run("dense", 0, "random", schedule, 0)
        for chi in (16, 8, 4, 32):
            yield Run("mpo", chi, "fold", schedule, 0)
    for size in (16, 8, 4, 32):
        for system in ("low-rank", "kronecker"):
            yield Run(system, CHI[size], "fold", "tuned", 0)
    for sites in (2, 3):  # at equal χ, and at equal parameters
        yield Run(f"mpo{sites}", 16, "fold", "tuned", 0)
        yield Run(f"mpo{sites}", CHI[16], "fold", "tuned", 0)
    for layers in (3, 2, 1):
        yield Run("layers", layers, "fold", "tuned", 0)
    for schedule in ("tuned", "paper"):
        for chi in (16, 8, 4, 32):
            yield Run("mpo", chi, "random", schedule, 0)
    for seed in (1, 2):
        yield Run("dense", 0, "random", "tuned", seed)
        yield Run("mpo", 16, "fold", "tuned", seed)
        yield Run("mpo", 16, "random", "tuned", seed)
    for seed in (0, 1, 2):
        yield Run("mpo", 16, "fold-fast", "tuned", seed)
        yield Run("mpo", 16, "fold-long", "tuned", seed)
        yield Run("mpo", 16, "fold-calibrated", "tuned", seed)
        yield Run("mpo", 16, "fold-calibrated-long", "tuned", seed)


def recipe_of(run: Run, model: Any) -> Any:
    """What folds the dense model into the run's."""
    from tensorfold import Kronecker, LowRank, Recipe

    if run.system == "layers":
        return Recipe(fold=(), layers=tuple(range(run.size)))
    if run.system in ("low-rank", "kronecker"):
        return at_most(model, LowRank if run.system == "low-rank" else Kronecker, run.size)
    sites = {"mpo": "paper", "mpo2": 2, "mpo3": 3}[run.system]
    chi = run.size if run.size in CHI else bond_for(run.size, sites)
    return recipe(chi, sites, init="random" if run.start == "random" else None)


def at_most(model: Any, method: Any, parameters: int) -> Any:
    """All 25 matrices by ``method`` with the largest common ``keep`` whose model has at most ``parameters``."""
    import tensorfold
    from tensorfold import Recipe, Rule

    def with_keep(thousandths: int) -> Any:
        return Recipe(fold=(Rule(["all-linear", "lm_head"], method(keep=thousandths / 1000)),))

    def fits(thousandths: int) -> bool:
        try:
            return tensorfold.plan(model, with_keep(thousandths)).parameters_after <= parameters
        except tensorfold.SpecError:  # less than the smallest that a matrix can have
            return True

    low, high = 1, 999
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return with_keep(low)


def training_text(whole: str) -> str:
    """What of a text trains: all but the last 10 % of its windows, which validate."""
    windows = len(whole) // 256
    return whole[: (windows - int(windows * 0.1)) * 256]


def scores(model: Any, text: Path, tokenizer: Any) -> dict[str, float]:
    """Loss (nats a character) and accuracy on the 435 windows, and on the paper's 20 · 8 random ones."""
    import torch

    from tensorfold.data.token_cache import TokenCache

    cache = TokenCache.build(text, tokenizer, 256, validation_fraction=0.1)
    held_out = torch.stack(
        [block["input_ids"] for block in (cache.validation[k] for k in range(len(cache.validation)))]
    )
    stream = held_out.flatten()
    starts = torch.randint(len(stream) - 256, (160,), generator=torch.Generator().manual_seed(0))
    windows = {"": (held_out[:, :-1], held_out[:, 1:])}
    windows["random_"] = tuple(torch.stack([stream[s + k : s + k + 256] for s in starts]) for k in (0, 1))
    out = {}
    model.eval()
    for name, (ids, targets) in windows.items():
        losses, right = [], []
        for chunk, target in zip(ids.split(8), targets.split(8), strict=True):
            with torch.no_grad():
                logits = model(input_ids=chunk, use_cache=False).logits.flatten(0, 1)
            losses.append(torch.nn.functional.cross_entropy(logits, target.flatten(), reduction="none"))
            right.append(logits.argmax(-1) == target.flatten())
        out[f"{name}loss"] = torch.cat(losses).mean().item()
        out[f"{name}accuracy"] = torch.cat(right).float().mean().item()
    return out


def errors(model: Any, dense: Any) -> dict[str, float]:
    """‖W − Ŵ‖ / ‖W‖ of every folded matrix against the dense model's."""
    from tensorfold.algebra.solvers.solve import relative_error
    from tensorfold.nn import MPOLinear

    weights = {name: module.weight for name, module in dense.named_modules() if hasattr(module, "weight")}
    return {
        name: relative_error(weights[name].detach(), module.to_dense().detach())
        for name, module in model.named_modules()
        if isinstance(module, MPOLinear)
    }


def one_run(run: Run, work: Path, text: Path, steps: int, healing_steps: int, characters: int) -> dict[str, Any]:
    """Train or fold and heal, on the first ``characters`` of the text."""
    import torch

    import tensorfold
    from tensorfold.healing.heal import heal
    from tensorfold.models.anatomy import count_parameters
    from tensorfold.models.picogpt import PicoGPTConfig, PicoGPTForCausalLM, character_tokenizer

    started = time.monotonic()
    training, configuration = SCHEDULES[run.schedule]
    whole = text.read_text(encoding="utf-8")
    tokenizer = character_tokenizer(whole)
    if characters < len(whole):
        text = work / f"{run.name}.txt"
        text.write_text(whole[:characters], encoding="utf-8")
    trained_dense = run.start != "random"
    if trained_dense:
        model, teacher = (tensorfold.load(work / run.dense.name) for _ in range(2))
    else:
        torch.manual_seed(run.seed)
        model, teacher = PicoGPTForCausalLM(PicoGPTConfig(**configuration)), None
    report = None
    if run.system != "dense":
        texts = [training_text(whole[:characters])] if run.calibrated else None
        report = tensorfold.fold(
            model, recipe_of(run, model), tokenizer, texts, calibration_tokens=CALIBRATION if texts else None
        )
    before = scores(model, text, tokenizer)
    dense_errors = errors(model, teacher) if teacher is not None and run.system != "layers" else {}
    few = trained_dense and not run.long
    settings = {**COMMON, **training, "steps": healing_steps if few else steps, "seed": run.seed}
    settings["evaluate_every"] = -(-settings["steps"] // 20) if characters >= len(whole) else settings["steps"]
    if trained_dense:
        settings |= HEALING if run.start == "fold" else {**HEALING, "lr": FAST}
    settings["warmup"] = min(settings["warmup"], settings["steps"] // 10)
    result = heal(model, text, teacher, tokenizer=tokenizer, out=work / run.name, **settings)
    return {
        "run": run.name,
        **dataclasses.asdict(run),
        "parameters": count_parameters(model),
        "before": before,
        "after": scores(model, text, tokenizer),
        **({"dense": scores(teacher, text, tokenizer)} if teacher is not None else {}),
        "errors_before": dense_errors,
        "errors_after": errors(model, teacher) if dense_errors and teacher is not None else {},
        "modules": {} if report is None else {name: str(spec) for name, spec in report.modules.items()},
        "steps": result.steps,
        "tokens": result.tokens,
        "settings": settings,
        "configuration": configuration,
        "threads": torch.get_num_threads(),
        "seconds": round(time.monotonic() - started, 1),
    }


def keep_log(source: Path, target: Path) -> None:
    """Every twentieth step and every evaluation."""
    target.parent.mkdir(exist_ok=True)
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    kept = [line for line in lines if line["step"] % 20 == 0 or "validation_loss" in line]
    target.write_text("".join(json.dumps(line) + "\n" for line in kept))


def done(runs: Path) -> set[str]:
    return {json.loads(line)["run"] for line in runs.read_text().splitlines()} if runs.exists() else set()


def next_run(waiting: list[Run], running: list[Run]) -> Run | None:
    """The first run whose dense model is not still to be trained."""
    unfinished = {run.name for run in [*waiting, *running]}
    return next((run for run in waiting if run.start == "random" or run.dense.name not in unfinished), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("TENSORFOLD_DATA", "."))
    parser.add_argument("--work", type=Path, required=True, help="Directory for models and checkpoints.")
    parser.add_argument("--text", type=Path, default=data / "tinyshakespeare.txt")
    parser.add_argument("--jobs", type=int, default=2, help="Runs at a time, one thread each.")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="Runs whose names match.")
    parser.add_argument("--list", action="store_true", help="Name the runs and whether they are done.")
    parser.add_argument("--quick", action="store_true", help="A few steps of each kind, logged in WORK; for the tests.")
    parser.add_argument("--one", metavar="RUN", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    runs_file, logs, amount = RUNS, LOGS, (STEPS, HEALING_STEPS, sys.maxsize)
    runs = [run for run in planned() if any(fnmatch.fnmatch(run.name, pattern) for pattern in arguments.only)]
    if arguments.quick:
        runs_file, logs, amount = arguments.work / "runs.jsonl", arguments.work / "logs", (6, 3, 60_000)
        tried = [("dense", 0), ("mpo", 16), ("low-rank", CHI[16]), ("kronecker", CHI[16])]
        runs = [
            run
            for run in planned()
            if run.schedule == "tuned" and not run.seed and (run.system, run.size) in tried and "-" not in run.start
        ]
    finished = done(runs_file)
    if arguments.list:
        print("\n".join(f"{'done' if run.name in finished else 'to do':6}{run.name}" for run in runs))
        return
    if arguments.one:
        run = next(run for run in runs if run.name == arguments.one)
        entry = one_run(run, arguments.work, arguments.text, *amount)
        keep_log(arguments.work / run.name / "heal.jsonl", logs / f"{run.name}.jsonl")
        if run.name not in finished:
            with runs_file.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        return

    waiting = [run for run in runs if run.name not in finished]
    needed = {run.dense for run in waiting if run.start != "random"}
    waiting = [
        run for run in planned() if run in waiting or (run in needed and not model_in(arguments.work / run.name))
    ]
    running: dict[Run, subprocess.Popen[bytes]] = {}
    failed = []
    while waiting or running:
        for run, process in list(running.items()):
            if process.poll() is not None:
                del running[run]
                failed += [run.name] if process.returncode else []
        run = next_run(waiting, list(running))
        if run is not None and len(running) < arguments.jobs:
            waiting.remove(run)
            print(f"{time.strftime('%H:%M:%S')} {run.name}; {len(waiting)} to go", flush=True)
            command = [sys.executable, __file__, *sys.argv[1:], "--one", run.name]
            running[run] = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        elif not running:
            break
        time.sleep(1)
    if failed or waiting:
        raise SystemExit(f"failed: {failed}; not begun: {[run.name for run in waiting]}")


def model_in(directory: Path) -> bool:
    return (directory / "config.json").exists()


if __name__ == "__main__":
    main()
