"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  // Dragging zooms with a mouse; a finger has to be able to scroll past the charts.
  const dragmode = matchMedia("(pointer: fine)").matches ? "zoom" : false;

  function theme() {
    const [paper, ink, line] = ["--paper", "--ink", "--line"].map(colour);
    const look = {
      "paper_bgcolor": "rgba(0,0,0,0)",
      "plot_bgcolor": "rgba(0,0,0,0)",
      "font.color": ink,
      "font.family": "system-ui, sans-serif",
      "font.size": 12,
      "hoverlabel.bgcolor": paper,
      "hoverlabel.bordercolor": line,
      "hoverlabel.font.color": ink,
      dragmode,
    };
    for (const axis of ["xaxis", "yaxis"]) {
      for (const part of ["gridcolor", "linecolor", "zerolinecolor"]) look[`${axis}.${part}`] = line;
    }
    return look;
  }

  const charts = Object.keys(figures).map((id) => document.getElementById(id));
  for (const chart of charts) {
    const { data, layout } = figures[chart.id];
    Plotly.newPlot(chart, data, layout, { responsive: true, displayModeBar: false, displaylogo: false })
      .then(() => Plotly.relayout(chart, theme()));
  }
  for (const entry of document.querySelectorAll(".legend button")) {
    entry.addEventListener("click", () => {
      const shown = entry.getAttribute("aria-pressed") !== "true";
      entry.setAttribute("aria-pressed", String(shown));
      Plotly.restyle(entry.dataset.chart, { visible: shown }, entry.dataset.traces.split(",").map(Number));
    });
  }
  for (const map of document.querySelectorAll(".map")) {
    const said = map.querySelector(".reason");
    const rows = [...map.querySelectorAll("tbody tr")].map((row) => [...row.cells].slice(1).map((cell) => cell.firstElementChild));
    const show = (event) => {
      const cell = event.target.closest("td button");
      if (!cell) return;
      map.querySelector(".shown")?.classList.remove("shown");
      cell.classList.add("shown");
      said.textContent = cell.title;
    };
    for (const kind of ["pointerover", "focusin", "click"]) map.addEventListener(kind, show);
    map.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      const at = rows.findIndex((row) => row.includes(event.target));
      if (!step || at < 0) return;
      event.preventDefault();
      const next = rows[at + step[0]]?.[rows[at].indexOf(event.target) + step[1]];
      if (!next) return;
      event.target.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
  }
  // Charts in what is folded away have no width until it is opened.
  for (const more of document.querySelectorAll("details.more")) {
    more.addEventListener("toggle", () => more.querySelectorAll(".chart").forEach((chart) => Plotly.Plots.resize(chart)));
  }
  dark.addEventListener("change", () => charts.forEach((chart) => Plotly.relayout(chart, theme())));
})();
