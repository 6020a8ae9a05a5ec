"""Pictures of a report for docs/: python studies/demo/pictures.py RUN/report.html

In the light theme from the top, in the dark one from the map of what was chosen, and three parts on a phone. Needs
Chromium. Pages are shown in frames, since a headless window is at least 500 pixels wide.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).parents[2] / "docs"
# Name of the picture: dark or not, width and height of a frame, and the part of the page in each.
PICTURES = {
    "report-light": (False, (1100, 1640), ("top",)),
    "report-dark": (True, (1100, 1640), ("chosen",)),
    "report-phone": (False, (390, 1240), ("top", "chosen", "samples")),
}
_GAP = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    report = parser.parse_args().report
    for name, (dark, (width, height), parts) in PICTURES.items():
        with tempfile.TemporaryDirectory() as directory:
            work = Path(directory)
            shutil.copy(report, work / "report.html")
            frames = "".join(
                f'<iframe src="report.html#{part}" width="{width}" height="{height}"></iframe>' for part in parts
            )
            style = f"body{{margin:0;display:flex;gap:{_GAP}px;background:#fff}}iframe{{border:0;flex:none}}"
            (work / "frames.html").write_text(f"<!doctype html><style>{style}</style>{frames}", encoding="utf-8")
            whole = (width + _GAP) * len(parts) - _GAP
            subprocess.run(
                [
                    "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                    f"--user-data-dir={work / 'profile'}", f"--window-size={whole},{height}",
                    f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=10000",
                    f"--screenshot={work / 'shot.png'}", (work / "frames.html").as_uri(),
                ],
                check=True, capture_output=True, timeout=240,
            )  # fmt: skip
            picture = Image.open(work / "shot.png").convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE)
            picture.save(DOCS / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
