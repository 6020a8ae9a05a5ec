"""What the table scripts share: generated sections of a README, and pictures that are equal where the data is.

A section stands between ``<!-- NAME -->`` and ``<!-- end of NAME -->``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def with_sections(readme: Path, sections: Mapping[str, str]) -> str:
    """The file's text with these sections.

    Raises:
        ValueError: The file does not have one of them exactly once.
    """
    text = readme.read_text(encoding="utf-8")
    for name, section in sections.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if (text.count(begin), text.count(end)) != (1, 1):
            raise ValueError(f"{readme}: needed {begin} and {end} once each.")
        head, rest = text.split(begin)
        text = f"{head}{begin}\n\n{section}\n\n{end}{rest.split(end)[1]}"
    return text


def write_sections(readme: Path, sections: Mapping[str, str]) -> None:
    """Replace what stands in each section.

    Raises:
        ValueError: The file does not have it exactly once.
    """
    readme.write_text(with_sections(readme, sections), encoding="utf-8")


def save_picture(figure: Figure, path: Path) -> None:
    """As SVG, without what differs from run to run."""
    figure.tight_layout()
    with mpl.rc_context({"svg.hashsalt": "tensorfold"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
