"""Named protocols: from text to windows of token ids, and from the windows' scores to one mean.

Every window begins with what the tokenizer puts before a document, ``tokens.prefix_of``: nothing for GPT-2's or
SmolLM2's, a beginning-of-sequence token for Gemma's or Llama's. It is context and never counts as a predicted token,
and the tokens that count are the same with it and without. Published protocols give that token to the first window of
the text only; a model that was trained with one is not itself in the windows after it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorfold.data.tokens import Encoder, begin
from tensorfold.errors import InputError

# The protocol of lm-evaluation-harness, whose tasks bring text and windows of their own: tensorfold.evaluation.lm_eval.
HARNESS = "lm-eval"


@dataclass(frozen=True)
class Window:
    """Token ids of one forward pass, shape ``(length,)``; the last ``scored`` of them are predicted and count.

    The last one is never fed, so the model reads one token less than a window has.
    """

    ids: Tensor
    scored: int

    @classmethod
    def of(cls, prefix: Sequence[int], text: Tensor, scored: int, positions: int | None) -> Window:
        """The prefix, then as much of the end of ``text`` as the model has ``positions`` for.

        Raises:
            InputError: Prefix and scored tokens are more than that.
        """
        room = len(text) if positions is None else positions + 1 - len(prefix)
        # Without a token before it, the first of those left cannot be scored.
        needed = scored if prefix else scored + 1
        if room < min(needed, len(text)):
            raise InputError(
                f"a window of {len(text)} tokens behind the {len(prefix)} that the tokenizer puts before a document "
                f"is too long for the model's {positions} positions; use disjoint-{max(2, room)}"
            )
        return cls(begin(prefix, text[-room:] if room < len(text) else text), scored)


@dataclass(frozen=True)
class Score:
    """Summed negative log-likelihood (nats) and argmax hits over the scored tokens of one window."""

    nll: float
    correct: int
    tokens: int


@dataclass(frozen=True)
class WindowProtocol:
    """Windows over one stream: what the tokenizer puts before a document, then the documents joined by a blank line.

    With ``stride < length`` a window scores only the tokens that no window before it has scored, as in Hugging Face's
    sliding-window recipe. The first token of the stream, or of each disjoint window, is not scored. The prefix that
    opens the stream opens every later window as well, in front of its ``length`` tokens: the model reads ``length``
    tokens then instead of ``length - 1``, and the same ones count.

    Args:
        name: Name in results.
        length: Tokens of the stream in a window.
        stride: Tokens from the start of one window to the next.
        mean_of_windows: Average the windows' means, not the tokens: a short tail then weighs as much as a full window.
        drop_tail: Leave out the last window where it is not full.
        form: Of wikitext, the form that the protocol is defined on, ``raw`` or ``non-raw``; None for any.
    """

    name: str
    length: int
    stride: int
    mean_of_windows: bool = False
    drop_tail: bool = False
    form: str | None = None

    @property
    def context(self) -> int | None:
        """Positions the model must have."""
        return self.length

    def windows(
        self, encoder: Encoder, documents: Sequence[str], max_tokens: int | None, positions: int | None
    ) -> list[Window]:
        """Windows in reading order; the stream is cut after its first ``max_tokens`` tokens."""
        stream = torch.tensor(encoder.first("\n\n".join(documents), max_tokens), dtype=torch.long)
        opening = len(encoder.prefix)
        needed = self.length if self.drop_tail else max(2, opening + 1)
        if len(stream) < needed:
            raise InputError(
                f"text too short: got {len(stream)} tokens, protocol {self.name} needs at least {needed}; "
                f"give a longer text{', a larger max_tokens' if max_tokens else ''} or a shorter window (disjoint-N)"
            )
        windows, scored_until = [], 0
        for start in range(0, len(stream), self.stride):
            end = min(start + self.length, len(stream))
            if self.drop_tail and end < start + self.length:
                break
            scored = min(end - scored_until, end - start - max(1, opening - start))
            if scored > 0:
                windows.append(Window.of(encoder.prefix, stream[max(start, opening) : end], scored, positions))
            scored_until = end
        return windows

    def summarise(self, scores: Sequence[Score]) -> tuple[float, float]:
        """(mean negative log-likelihood in nats, share of tokens whose argmax is right)."""
        tokens = sum(score.tokens for score in scores)
        accuracy = sum(score.correct for score in scores) / tokens
        if self.mean_of_windows:
            return sum(score.nll / score.tokens for score in scores) / len(scores), accuracy
        return sum(score.nll for score in scores) / tokens, accuracy


@dataclass(frozen=True)
class LastWordProtocol:
    """The last word of each document from all that goes before it, as lm-eval's ``lambada_openai`` does it.

    Perplexity is exp of the mean over passages of the word's summed negative log-likelihood; a passage is accurate
    if every token of the word, the space before it included, is the argmax (Paperno et al., arXiv 1606.06031).
    """

    name: str

    @property
    def context(self) -> int | None:
        """``None``: a passage too long for the model loses its beginning."""
        return None

    def windows(
        self, encoder: Encoder, documents: Sequence[str], max_tokens: int | None, positions: int | None
    ) -> list[Window]:
        """One window a passage, for as many whole passages as ``max_tokens`` tokens allow."""
        windows, total = [], 0
        for number, document in enumerate(documents, start=1):
            ids, scored = self._split(encoder, number, document)
            total += len(ids)
            if max_tokens is not None and total > max_tokens:
                break
            text = torch.tensor(ids[len(encoder.prefix) :], dtype=torch.long)
            windows.append(Window.of(encoder.prefix, text, scored, positions))
        if not windows:
            raise InputError(
                f"max_tokens={max_tokens} is too small for {self.name}: the first passage has {total} tokens; "
                f"give max_tokens of at least {total}"
            )
        return windows

    def summarise(self, scores: Sequence[Score]) -> tuple[float, float]:
        """(mean over passages of the word's negative log-likelihood in nats, share of passages that are right)."""
        right = sum(score.correct == score.tokens for score in scores)
        return sum(score.nll for score in scores) / len(scores), right / len(scores)

    def _split(self, encoder: Encoder, number: int, document: str) -> tuple[list[int], int]:
        passage = document.rstrip()
        # Spaces before the word belong to the target: tokenisers join them to it, not to the context.
        context = passage.rpartition(" ")[0].rstrip()
        ids = encoder(passage)
        scored = len(ids) - len(encoder(context))
        if not context or not 0 < scored < len(ids):
            raise InputError(
                f"{self.name}: passage {number} ({passage[:40]!r}) has no last word after a context; "
                f"give one passage a document, in a .jsonl file with a passage a line"
            )
        return ids, scored


Protocol = WindowProtocol | LastWordProtocol

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        WindowProtocol("hf-1024", length=1024, stride=1024),
        WindowProtocol("hf-512", length=1024, stride=512),
        WindowProtocol("krony", length=1024, stride=1024, mean_of_windows=True, form="non-raw"),
        WindowProtocol("svd-llm", length=2048, stride=2048, drop_tail=True),
        LastWordProtocol("lambada"),
    )
}


def form_needed(name: str) -> str | None:
    """The form of wikitext that a protocol is defined on, None for any."""
    return None if name == HARNESS else getattr(get_protocol(name), "form", None)


def get_protocol(name: str) -> Protocol:
    """The protocol called ``name``: a row of :data:`PROTOCOLS`, or ``disjoint-N`` for any window ``N >= 2``.

    Raises:
        InputError: No protocol has that name; the message offers the nearest one.
    """
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    disjoint = re.fullmatch(r"disjoint-(\d{1,9})", name, flags=re.ASCII)
    if disjoint and int(disjoint[1]) >= 2:
        length = int(disjoint[1])
        return WindowProtocol(f"disjoint-{length}", length=length, stride=length)
    near = difflib.get_close_matches(name, [*PROTOCOLS, "disjoint-512", HARNESS], n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(
        f"unknown protocol {name!r}; {hint}needed one of {', '.join(PROTOCOLS)}, disjoint-N with N >= 2, or {HARNESS}"
    )
