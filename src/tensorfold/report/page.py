"""The report's HTML page: reads model directories, draws their facts, and writes one file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tensorfold
from tensorfold.errors import InputError
from tensorfold.report.chosen import maps_of
from tensorfold.report.facts import ModelFacts, check_directory, labels, read_directory
from tensorfold.report.outcome import headline, loading, outcome_chart, outcome_rows, speed_bars
from tensorfold.report.samples import Sample, sample_all
from tensorfold.report.tables import bench_rows, bond_rows, choice_rows, healing_rows, judgements, size_rows
from tensorfold.utils.atomic_files import check_file_target, write_file
from tensorfold.utils.devices import check_device
from tensorfold.utils.terminal import progress_bar
from tensorfold.utils.validation import check_types

if TYPE_CHECKING:
    from tensorfold.report.figures import Chart

PACKAGES = ("jinja2", "plotly")
PROMPT = "Once upon a time"
SAMPLE_TOKENS = 48


def missing_packages() -> list[str]:
    """Names of the packages that draw the page and are not installed."""
    return [package for package in PACKAGES if importlib.util.find_spec(package) is None]


def check_packages() -> None:
    """Check that the packages that draw the page are installed.

    Raises:
        InputError: One is missing; the message has the command that installs it.
    """
    missing = missing_packages()
    if missing:
        raise InputError(
            f"report needs the packages {' and '.join(PACKAGES)}, and {', '.join(missing)} is missing; "
            f"run: pip install {' '.join(missing)}"
        )


def write_report(
    directories: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    prompt: str | None = PROMPT,
    tokens: int = SAMPLE_TOKENS,
    progress: bool = False,
    outcome: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Write one HTML page, without anything from a network, about one or several model directories.

    Args:
        directories: Folded, healed or dense models. Perplexities on a text are compared with the dense model's, where
            just one dense model was evaluated on it.
        out: File to write, whole or not at all; one that is there is replaced.
        prompt: Text that every model continues greedily, side by side; None leaves the samples out.
        tokens: New tokens in a sample, at most.
        progress: Whether a progress bar is shown on standard error.
        outcome: What ``tensorfold compress`` came to, the JSON values of ``compress.json``; its numbers, picture and
            table come first. Its samples are the page's, and no model is loaded.
        dtype, device: Type and place of the models that write samples; as stored, and the CPU, by default.

    Raises:
        InputError: A directory is not a readable model's, there is no such device, ``out`` cannot be written, or a
            package is missing.
        TensorfoldError: The disk is full.
    """
    check_packages()
    check_device(device)
    if outcome is not None:
        prompt = None
    check_types("report", directories=(directories, list | tuple), out=(out, str | os.PathLike))
    check_types("report", prompt=(prompt, str | None), tokens=(tokens, int))
    try:
        (prompt or "").encode()
    except UnicodeEncodeError:
        raise InputError(f"report: got prompt={prompt!r:.100}; needed text that UTF-8 can hold.") from None
    for each in directories:
        check_types("report", directory=(each, str | os.PathLike))
    target = Path(out)
    check_file_target(target)
    paths = [Path(directory) for directory in directories]
    if not paths:
        raise InputError("report: no directories; needed at least one.")
    names = labels(paths)
    for path in paths:
        check_directory(path)
    bar = progress_bar("report", progress)
    task = bar.add_task("", total=len(paths) * (1 if prompt is None else 2))
    models: list[ModelFacts] = []
    samples: list[Sample] = []
    with bar:
        for path, name in zip(paths, names, strict=True):
            models.append(read_directory(path, name, lambda what: bar.update(task, description=what)))
            bar.advance(task)
        if prompt is not None:
            for sample in sample_all(models, prompt, tokens, dtype, device):
                bar.advance(task)
                samples.append(sample)
    if outcome is not None:
        prompt, samples = outcome["prompt"], [Sample(**each) for each in outcome["samples"]]
    write_file(target, render(models, prompt, samples, outcome).encode())


def render(
    models: Sequence[ModelFacts],
    prompt: str | None,
    samples: Sequence[Sample],
    outcome: Mapping[str, Any] | None = None,
) -> str:
    """HTML of the page: everything from files is escaped, and only this package's scripts may run in it.

    Args:
        models: Facts about the models.
        prompt: Prompt of the samples; None without samples.
        samples: Continuations of the prompt.
        outcome: As :func:`write_report` takes it.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("tensorfold.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    sections = _charts(models)
    sections["outcome"] = [outcome_chart(outcome)] if outcome is not None else []
    charts = [chart for group in sections.values() for chart in group]
    # The parser that checks the hashes has turned every line end into one character.
    scripts = [text.replace("\r\n", "\n").replace("\r", "\n") for text in (get_plotlyjs(), _resource("page.js"))]
    return environment.get_template("page.html").render(
        css=_resource("page.css"),
        scripts=[script.replace("</script", "<\\/script") for script in scripts],
        hashes=[_hash(script.replace("</script", "<\\/script")) for script in scripts],
        figures=_inert(json.dumps({chart.id: chart.figure for chart in charts}, allow_nan=False)),
        charts=sections,
        sizes=size_rows(models),
        judgements=judgements(models),
        bonds=[(model, bond_rows(model)) for model in models if model.is_folded],
        choices=[(model, choice_rows(model)) for model in models if model.choices],
        healing=healing_rows(models),
        bench=[(model.label, bench_rows(model.bench)) for model in models if model.bench is not None],
        maps=maps_of(models),
        prompt=prompt,
        samples=samples,
        outcome=outcome,
        heading=_heading(outcome),
        speeds=speed_bars(outcome) if outcome is not None else [],
        headline=headline(outcome) if outcome is not None else [],
        outcomes=outcome_rows(outcome) if outcome is not None else [],
        loading=loading(outcome) if outcome is not None else "",
        notes=[(model.label, note) for model in models for note in model.notes],
        title=", ".join(model.label for model in models),
        version=tensorfold.__version__,
    )


def _heading(outcome: Mapping[str, Any] | None) -> str:
    """Heading of the page."""
    if outcome is None:
        return "Tensorfold report"
    name = str(outcome["order"]["model"]).rstrip("/").rpartition("/")[2]
    parameters = outcome["rows"][-1]["parameters"] / outcome["rows"][0]["parameters"]
    return f"{name} with {parameters:.0%} of its parameters"


def _charts(models: Sequence[ModelFacts]) -> dict[str, list[Chart]]:
    """Charts by section of the page; a section without charts says there how to get them."""
    from tensorfold.report import figures

    indexed = list(enumerate(models))
    judges = dict.fromkeys(each.judge for model in models for each in model.evaluations)
    rows = {
        judge: [(index, model, each) for index, model in indexed for each in model.evaluations if each.judge == judge]
        for judge in judges
    }
    errors = [each.error for model in models for each in model.modules.values() if each.error is not None]
    highest = max(errors, default=0.0) or 1.0
    sections: dict[str, list[Chart | None]] = {
        "pareto": [
            figures.pareto(judge, found, f"pareto-{k}")
            for k, (judge, found) in enumerate(rows.items())
            if len(found) > 1
        ],
        "errors": [figures.error_map(model, highest, f"errors-{index}") for index, model in indexed],
        "choices": [figures.choices(model, f"choices-{index}") for index, model in indexed],
        "spectra": [figures.spectra(model, f"spectra-{index}") for index, model in indexed],
        "losses": [
            figures.losses(indexed, "losses"),
            *(figures.block_losses(model, f"blocks-{index}") for index, model in indexed),
        ],
    }
    return {name: [chart for chart in found if chart is not None] for name, found in sections.items()}


def _inert(data: str) -> Any:
    """Escape JSON so that it cannot end the script element around it, and mark it as safe for the template."""
    from markupsafe import Markup

    return Markup(data.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _hash(script: str) -> str:
    """Hash of a script as the page's content security policy names it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _resource(name: str) -> str:
    """Text of a file among the package's templates."""
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")
