"""Pages read as a browser's parser reads them, and looked at in Chromium itself."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

CHROMIUM = shutil.which("chromium")


class Page(HTMLParser):
    """What a page says, with the scripts apart from the text, and every attribute of every element."""

    def __init__(self, html):
        super().__init__()
        self.words, self.scripts, self.elements, self.within = [], [], [], []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.within.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        while self.within and self.within.pop() != tag:
            pass

    def handle_data(self, data):
        if "script" in self.within:
            self.scripts[-1] += data
        elif "style" not in self.within:
            self.words.append(data)

    @property
    def figures(self):
        return json.loads(self.scripts[0])

    def attributes(self, name):
        return [values[name] for _, values in self.elements if name in values]


PROBE = r"""
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const light = (colour) => {
  const [r, g, b] = colour.match(/[\d.]+/g).map(Number).map((v) => (colour.startsWith("color(") ? v : v / 255))
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const maps = () => {
  const map = document.querySelector(".map");
  if (!map) return { maps: 0 };
  const cells = all("td button", map), said = map.querySelector(".reason");
  let agree = 0;
  cells[0].dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
  agree += said.textContent === cells[0].title;
  cells[1].click();
  agree += said.textContent === cells[1].title;
  const [before] = all("td button[tabindex='0']", map);
  before.focus();
  before.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown", bubbles: true }));
  agree += said.textContent === document.activeElement.title && document.activeElement !== before;
  const contrasts = cells.map((cell) => {
    const [a, b] = [getComputedStyle(cell).color, getComputedStyle(cell).backgroundColor].map(light);
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  });
  return {
    maps: all(".map").length, cells: cells.length, said: agree,
    reasons: new Set([cells[0].title, cells[1].title, document.activeElement.title]).size,
    contrast: Math.min(...contrasts),
  };
};
addEventListener("load", () => setTimeout(() => {
  const charts = all(".chart");
  const drawing = ".main-svg :is(.js-line, .point, .heatmaplayer image)";
  const before = all(drawing).length;
  const entry = document.querySelector(".legend button");
  entry.click();
  setTimeout(() => {
    const hidden = before - all(drawing).length;
    entry.click();
    setTimeout(() => parent.postMessage({
      width: innerWidth,
      scroll: document.documentElement.scrollWidth,
      dark: matchMedia("(prefers-color-scheme: dark)").matches,
      ink: getComputedStyle(document.body).color,
      labels: [...new Set(all(".chart .xtitle").map((text) => getComputedStyle(text).fill))],
      charts: charts.length,
      drawn: charts.filter((chart) => chart.querySelector(drawing)).length,
      hidden,
      outside: all(".chart .main-svg").filter((svg) => svg.getBoundingClientRect().right > innerWidth + 1).length,
      images: document.images.length,
      ...maps(),
    }, "*"), 500);
  }, 500);
}, 1000));
"""

# Headless windows are at least 500 pixels wide, frames in them are not.
FRAME = """<!doctype html><body style="margin:0">
<script>addEventListener("message", (event) => { document.body.dataset.found = JSON.stringify(event.data); });</script>
<iframe src="probed.html" width="WIDTH" height="844" style="border:0"></iframe>"""


def look(page: Path, width: int, dark: bool, work: Path) -> tuple[dict, list[str]]:
    """What a page is like in Chromium, found out by a script that its own policy is made to allow; and its console.

    Args:
        work: Where to put the changed copy and the browser's profile.
    """
    allowed = base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode()
    html = page.read_text(encoding="utf-8").replace("script-src ", f"script-src 'sha256-{allowed}' ", 1)
    html = html.replace("</body>", f"<script>{PROBE}</script></body>")
    (work / "probed.html").write_text(html, encoding="utf-8")
    (work / "frame.html").write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            f"--user-data-dir={work / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--window-size={max(width, 500)},900", "--virtual-time-budget=20000", "--dump-dom",
            (work / "frame.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=240, env={**os.environ, "HOME": str(work)},
    )  # fmt: skip
    found = re.search(r'data-found="([^"]+)"', done.stdout)
    assert found, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(found[1].replace("&quot;", '"')), console
