"""Picture of the speed-up of every folded layer against the number of tokens."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tensorfold.benchmark.report import BenchReport, short_label
from tensorfold.errors import InputError, pass_on_memory
from tensorfold.utils.atomic_files import check_file_target

_FORMATS = (".svg", ".png", ".pdf")


def check_plot(path: Path) -> None:
    """Check before anything is timed that a picture can be written to a path.

    Raises:
        InputError: matplotlib is missing, the format is not known, or there is no such directory.
    """
    if path.suffix.lower() not in _FORMATS:
        raise InputError(f"--plot {path}: needed a file that ends in {', '.join(_FORMATS)}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs the package matplotlib, which is not installed; run: pip install matplotlib")
    check_file_target(path)
    if not path.resolve().parent.is_dir():
        raise InputError(f"--plot {path}: cannot be written; name a file in a directory that there is.")


def draw(report: BenchReport, path: Path) -> None:
    """Draw the speed-up of folded layers over their dense layers, medians with quartiles, and write the picture.

    Args:
        report: Result of a benchmark.
        path: File whose ending is the picture's format.

    Raises:
        InputError: There is nothing to draw, or the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    layers = [layer for layer in report.layers if layer.points]
    if not layers:
        raise InputError(f"--plot: {report.model} has no folded layers whose speed could be drawn; leave --plot out.")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for layer in layers:
        points = sorted(layer.points, key=lambda point: point.timing.tokens)
        tokens = [point.timing.tokens for point in points]
        spreads = [point.timing.speedup["dense"] for point in points]
        [line] = axes.plot(
            tokens, [spread.median for spread in spreads], marker="o", label=f"{short_label(layer)}: {layer.spec}"
        )
        axes.fill_between(
            tokens,
            [spread.q1 for spread in spreads],
            [spread.q3 for spread in spreads],
            color=line.get_color(),
            alpha=0.2,
            linewidth=0,
        )
    axes.axhline(1.0, color="grey", linewidth=1, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({point.timing.tokens for layer in layers for point in layer.points}))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens")
    axes.set_ylabel("times as fast as the dense layer")
    machine = report.machine
    axes.set_title(f"{report.model}: {machine['threads']} threads, {machine['dtype']}, {machine['device']}")
    axes.legend(fontsize="small")
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        figure.savefig(partial)
        partial.replace(path)
    except OSError as error:
        pass_on_memory(error)
        raise InputError(f"--plot {path}: cannot be written: {error.strerror}; name another file.") from None
    finally:
        partial.unlink(missing_ok=True)
