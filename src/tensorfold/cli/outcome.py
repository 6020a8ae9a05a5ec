"""The outcome of ``compress``: a row for the result and for each form of the dense model, a table, and a verdict."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tensorfold.report.outcome import dense_name


@dataclass(frozen=True)
class Row:
    """A model and what was measured of it.

    Attributes:
        name: What it is, such as ``dense, 8 bits``.
        path: Directory, or the name that was given.
        ours: Whether it was folded.
        parameters: Of the model.
        bytes: Of its weights where they are stored.
        own: Perplexity on the held-out part of the text that was calibrated on.
        unseen: Perplexity on the other text.
        prompt: Tokens a second that it reads; None before that is measured.
        decode: Tokens a second that it writes; None where it has no cache.
        seen: Share of a text that it was judged by which it was fitted to, about; the larger of the two texts', 0 to 1.
        tokens: Predicted tokens of the held-out part.
        protocol: Protocol of the perplexities.
        timed_in: What the speeds were computed in: the engine's choice on this processor; empty before that.
    """

    name: str
    path: str
    ours: bool
    parameters: int
    bytes: int
    own: float
    unseen: float
    prompt: float | None = None
    decode: float | None = None
    seen: float = 0.0
    tokens: int = 0
    protocol: str = ""
    timed_in: str = ""

    def timed(self, prompt: float, decode: float | None, dtype: str) -> Row:
        """The row with its speeds, and what they were computed in."""
        return dataclasses.replace(self, prompt=prompt, decode=decode, timed_in=dtype)


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        order: What was asked for, as JSON values.
        aim: What the size meant, as JSON values.
        rows: The dense model, its forms in fewer bits, and what was folded; the last one is the result.
        own: Name of the text that was calibrated on.
        unseen: Name of the other text.
        prompt: What every row went on from; ``samples`` says how.
        samples: JSON values of a :class:`tensorfold.report.samples.Sample` for every row.
        out: Directory of the run.
        report: The HTML page; None without one.
    """

    order: dict[str, Any]
    aim: dict[str, Any]
    rows: list[Row]
    own: str
    unseen: str
    prompt: str
    samples: list[dict[str, Any]]
    out: str
    report: str | None

    @property
    def rival(self) -> Row | None:
        """The dense row that is no larger than the result and better, by the mean of both texts; None where none is."""
        result = self.rows[-1]
        found = [row for row in self._smaller if row.own * row.unseen <= result.own * result.unseen]
        return min(found, key=lambda row: (row.own * row.unseen, row.bytes), default=None)

    @property
    def half_rival(self) -> Row | None:
        """The dense row that is no larger and better on one of the texts only, where there is no rival; else None."""
        result = self.rows[-1]
        found = [row for row in self._smaller if row.own <= result.own or row.unseen <= result.unseen]
        return None if self.rival else min(found, key=lambda row: row.own * row.unseen, default=None)

    @property
    def _smaller(self) -> list[Row]:
        return [row for row in self.rows if not row.ours and row.bytes <= self.rows[-1].bytes]

    @property
    def verdict(self) -> str:
        """Whether folding paid, in words, and whether the bytes are those that were asked for."""
        result, most = self.rows[-1], self.order["most"]
        if most is None or result.bytes <= most:
            return self._worth
        return (
            f"The result takes {result.bytes:,} bytes, more than the {most:,} asked for: what is not folded, or the "
            f"graph around the weights, takes more than was reckoned; ask for fewer. {self._worth}"
        )

    @property
    def _worth(self) -> str:
        result, rival, dense = self.rows[-1], self.rival, [row for row in self.rows if not row.ours]
        if rival is not None:
            speed = _ratio(result.prompt, rival.prompt)
            faster = f" The folded one reads prompts {speed:.2f} times as fast." if speed and speed > 1 else ""
            return (
                "Folding does not pay at this size: by the mean of both texts a smaller model is better. "
                f"{self._beside(rival)} Take {rival.path}.{faster}"
            )
        same = next(row for row in dense if row.name == dense_name(self.aim["bits"]))
        other, speed = self.half_rival, _ratio(result.prompt, same.prompt)
        depends = f"It depends on the text whether folding pays. {self._beside(other)} The result: " if other else ""
        found = [
            f"{depends}{result.bytes / 1e6:,.1f} MB, {result.bytes / same.bytes:.2f} of {same.name}",
            f"perplexity on unseen text {result.unseen / dense[0].unseen:.2f} times the dense model's",
            *([f"reads prompts {speed:.2f} times as fast as {same.name}"] if speed else []),
        ]
        return f"{'; '.join(found)}."

    def _beside(self, row: Row) -> str:
        """A sentence about a smaller dense row beside the result."""
        result = self.rows[-1]
        name = row.name[0].upper() + row.name[1:]
        return (
            f"{name}, takes {row.bytes / 1e6:,.1f} MB against {result.bytes / 1e6:,.1f}, and has a perplexity of "
            f"{row.own:,.2f} against {result.own:,.2f} on held-out text and {row.unseen:,.2f} against "
            f"{result.unseen:,.2f} on unseen."
        )

    @property
    def rounding(self) -> str:
        """A sentence on what graphs round to where speeds are not of float32; else empty."""
        found = [row for row in self.rows if row.timed_in not in ("", "float32")]
        if not found:
            return ""
        return (
            f"Graphs were timed in {found[0].timed_in}, as {self.order['engine']} computes on this processor unless it "
            "is told otherwise; their perplexities are of float32."
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "order": {**self.order, "texts": list(self.order["texts"])},
            "aim": self.aim,
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "texts": {"own": self.own, "unseen": self.unseen},
            "pays": self.rival is None and self.half_rival is None,
            "verdict": self.verdict,
            "rounding": self.rounding,
            "prompt": self.prompt,
            "samples": self.samples,
            "out": self.out,
            "report": self.report,
        }

    def __str__(self) -> str:
        lines = [self._table(), self.verdict, f"The result is in {self.rows[-1].path}."]
        first = self.rows[0]
        lines.insert(1, f"Perplexity by {first.protocol}, {first.tokens:,} tokens of each text; × is against dense.")
        lines[2:2] = [self.rounding] if self.rounding else []
        if seen := max(row.seen for row in self.rows):
            lines.append(
                f"About {seen:.0%} of a text that was judged by stands in what was calibrated or healed on as well."
            )
        return "\n".join([*lines, f"The report is {self.report}."] if self.report else lines)

    def _table(self) -> str:
        from rich.table import Table

        from tensorfold.utils.terminal import render

        found = Table(box=None, pad_edge=False)
        found.add_column("")
        for heading in ("MB", "×", self.own, "×", self.unseen, "×", "prompt/s", "×", "decode/s", "×"):
            found.add_column(heading, justify="right")
        first = self.rows[0]
        for row in self.rows:
            cells = []
            for value, base, form in (
                (row.bytes / 1e6, first.bytes / 1e6, ",.1f"),
                (row.own, first.own, ",.2f"),
                (row.unseen, first.unseen, ",.2f"),
                (row.prompt, first.prompt, ",.0f"),
                (row.decode, first.decode, ",.0f"),
            ):
                ratio = _ratio(value, base)
                cells += ["" if value is None else format(value, form), "" if ratio is None else f"{ratio:.2f}"]
            found.add_row(row.name, *cells)
        return render(found)


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None
