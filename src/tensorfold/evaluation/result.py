"""The result of an evaluation, for people and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from tensorfold.data.seen_text import sentence


@dataclass(frozen=True)
class WindowScore:
    """What one window counts for.

    Attributes:
        nll: Negative log-likelihood of its scored tokens, summed, in nats.
        tokens: What that is divided by: scored tokens, or 1 where the protocol sums over a word.
        weight: Of the window in the mean; all weights together are 1.
    """

    nll: float
    tokens: int
    weight: float


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Args:
        perplexity: Exponential of the mean negative log-likelihood, averaged as the protocol says.
        tokens: Number of predicted tokens.
        protocol: Name of the protocol.
        text: Name of the text.
        seconds: Wall time, tokenising included.
        parameters: Parameters of the whole model, shared ones once.
        accuracy: Share of the predicted tokens that are the argmax of the logits; for ``lambada`` the share of passages
            in which all predicted tokens are.
        device: Device that the model ran on.
        dtype: Dtype of the model's floating-point parameters.
        window: Tokens of text in a full window of the protocol; None where it has no fixed length.
        prefix: Token ids that every window begins with: what the tokenizer puts before a document.
        seen: Recorded texts of the model that overlap with this one: ``purpose`` (``calibration``, ``training``, or
            ``selection`` of a checkpoint), ``text``, and the ``share`` in common. Empty where none is known.
        form: Form of a wikitext, ``raw`` or ``non-raw``, as found in it (see ``data.text_forms``); None for other text.
        bytes: Bytes of the whole model in its files, stored orders and scales included.
        interval: 95 % confidence interval of the perplexity, by the spread between windows; None for fewer than four.
        scores: Of every window; not in JSON.
    """

    perplexity: float
    tokens: int
    protocol: str
    text: str
    seconds: float
    parameters: int
    accuracy: float
    device: str
    dtype: str
    window: int | None = None
    prefix: tuple[int, ...] = ()
    seen: list[dict[str, Any]] = field(default_factory=list)
    form: str | None = None
    bytes: int = 0
    interval: tuple[float, float] | None = None
    scores: tuple[WindowScore, ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefix", tuple(self.prefix))  # JSON gives lists
        if self.interval is not None:
            object.__setattr__(self, "interval", (float(self.interval[0]), float(self.interval[1])))

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the field names, ready for JSON."""
        plain = {name: value for name, value in asdict(self).items() if name != "scores"}
        return {**plain, "prefix": list(self.prefix), "interval": list(self.interval) if self.interval else None}

    def __str__(self) -> str:
        perplexity = f"{self.perplexity:.2f}" if self.perplexity < 1e5 else f"{self.perplexity:.2e}"
        if self.interval is not None and self.interval[1] < 1e5:
            perplexity += f" [{self.interval[0]:.2f}, {self.interval[1]:.2f}]"
        form = f", {self.form}" if self.form else ""
        start = f", windows begin with token {' '.join(map(str, self.prefix))}" if self.prefix else ""
        line = (
            f"perplexity {perplexity}, accuracy {self.accuracy:.2%} "
            f"({self.protocol}{start}, {self.text}{form}, {self.tokens:,} tokens, {self.parameters:,} parameters)"
        )
        return "\n".join([line, *map(sentence, self.seen)])
