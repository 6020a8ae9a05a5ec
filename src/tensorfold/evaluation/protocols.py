"""Named protocols of evaluation: how a text is cut into windows, and how their scores become one mean.

Every window begins with what the tokenizer puts before a document (``tokens.prefix_of``): nothing for GPT-2 or SmolLM2,
a beginning-of-sequence token for Gemma or Llama. This prefix is context only and never a predicted token; which tokens
are predicted does not depend on it. Published protocols give it to the first window of a text alone, and so measure a
model that was trained with it without it in all later windows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorfold.data.tokens import Encoder, begin
from tensorfold.errors import InputError
from tensorfold.evaluation.result import WindowScore
from tensorfold.utils.validation import nearest

HARNESS = "lm-eval"  # lm-evaluation-harness, whose tasks bring text and windows of their own; see evaluation.lm_eval


@dataclass(frozen=True)
class Window:
    """The token ids of one forward pass and the number of those that are predicted.

    The model reads all tokens but the last, which is only predicted.

    Attributes:
        ids: Token ids, shape (length,).
        scored: How many of them, at the window's end, are predicted and scored.
    """

    ids: Tensor
    scored: int

    @classmethod
    def of(cls, prefix: Sequence[int], text: Tensor, scored: int, positions: int | None) -> Window:
        """The prefix, then as much of the end of a text as the model has positions for.

        Args:
            prefix: Token ids that the tokenizer puts before a document.
            text: Token ids, shape (length,).
            scored: How many of them, at the end, are predicted.
            positions: Positions of the model; None for no limit.

        Raises:
            InputError: The model has too few positions for the prefix and the scored tokens.
        """
        room = len(text) if positions is None else positions + 1 - len(prefix)
        # A first token without any before it cannot be predicted.
        needed = scored if prefix else scored + 1
        if room < min(needed, len(text)):
            raise InputError(
                f"a window of {len(text)} tokens behind the {len(prefix)} that the tokenizer puts before a document "
                f"is too long for the model's {positions} positions; use disjoint-{max(2, room)}"
            )
        return cls(begin(prefix, text[-room:] if room < len(text) else text), scored)


@dataclass(frozen=True)
class Score:
    """The score of one window.

    Attributes:
        nll: Negative log-likelihood of the scored tokens, summed, in nats.
        correct: How many of them are the argmax of their logits.
        tokens: How many tokens were scored.
    """

    nll: float
    correct: int
    tokens: int


@dataclass(frozen=True)
class WindowProtocol:
    """Windows cut from one stream: the tokenizer's prefix, then the documents joined by blank lines.

    Where ``stride < length``, a window scores only tokens that no window before it has scored, as in Hugging Face's
    sliding-window recipe. The first token of the stream, or of each disjoint window, is not scored. Windows after the
    first have the prefix in front of their ``length`` tokens: the model then reads ``length`` tokens instead of
    ``length - 1``, and the same tokens are scored.

    Args:
        name: Name in results.
        length: Tokens of the stream in a window.
        stride: Tokens from the start of one window to the start of the next.
        mean_of_windows: Average the means of windows instead of tokens, so that a short last window counts as much as a
            full one.
        drop_tail: Leave out the last window where it is not full.
        form: Form of wikitext that the protocol is defined on, ``raw`` or ``non-raw``; None for any.
    """

    name: str
    length: int
    stride: int
    mean_of_windows: bool = False
    drop_tail: bool = False
    form: str | None = None

    @property
    def context(self) -> int | None:
        """Number of positions that the model must have."""
        return self.length

    def windows(
        self, encoder: Encoder, documents: Sequence[str], max_tokens: int | None, positions: int | None
    ) -> list[Window]:
        """Cut documents into windows, in reading order.

        Args:
            encoder: Text to token ids.
            documents: The text before tokenising.
            max_tokens: How many tokens of the stream are used, from its beginning; None for all.
            positions: Positions of the model; None for no limit.

        Raises:
            InputError: The text is too short for a window, or a window too long for the model.
        """
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

    def weighed(self, scores: Sequence[Score]) -> tuple[WindowScore, ...]:
        """The scores with what each counts for in the mean, in nats a token."""
        total = sum(score.tokens for score in scores)
        return tuple(
            WindowScore(score.nll, score.tokens, 1 / len(scores) if self.mean_of_windows else score.tokens / total)
            for score in scores
        )

    def accuracy(self, scores: Sequence[Score]) -> float:
        """The share of tokens that are the argmax."""
        return sum(score.correct for score in scores) / sum(score.tokens for score in scores)


@dataclass(frozen=True)
class LastWordProtocol:
    """Prediction of the last word of each passage (LAMBADA: Paperno et al., arXiv 1606.06031).

    Scored as lm-evaluation-harness does in ``lambada_openai``: perplexity is the exponential of the word's negative
    log-likelihood, summed over its tokens and averaged over passages. A passage is right if all tokens of the word,
    with the space before it, are the argmax.
    """

    name: str

    @property
    def context(self) -> int | None:
        """None, no least number of positions: a passage too long for the model loses its beginning."""
        return None

    def windows(
        self, encoder: Encoder, documents: Sequence[str], max_tokens: int | None, positions: int | None
    ) -> list[Window]:
        """Make one window of each passage.

        Args:
            encoder: Text to token ids.
            documents: The passages.
            max_tokens: Most tokens together; passages behind those that fit are left out. None for all.
            positions: Positions of the model; None for no limit.

        Raises:
            InputError: The first passage has more than ``max_tokens`` tokens, or a passage has no last word after a
                context.
        """
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

    def weighed(self, scores: Sequence[Score]) -> tuple[WindowScore, ...]:
        """The scores with what each counts for in the mean, in nats a word."""
        return tuple(WindowScore(score.nll, 1, 1 / len(scores)) for score in scores)

    def accuracy(self, scores: Sequence[Score]) -> float:
        """The share of passages that are right."""
        return sum(score.correct == score.tokens for score in scores) / len(scores)

    def _split(self, encoder: Encoder, number: int, document: str) -> tuple[list[int], int]:
        """Token ids of a passage, and how many of them are its last word; ``number`` is for messages."""
        passage = document.rstrip()
        # The context ends before the space: tokenizers make the space part of the word's first token.
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
    """The form of wikitext that a protocol is defined on, ``raw`` or ``non-raw``; None for any text.

    Raises:
        InputError: No protocol has that name.
    """
    return None if name == HARNESS else getattr(get_protocol(name), "form", None)


def get_protocol(name: str) -> Protocol:
    """A protocol by its name: one of :data:`PROTOCOLS`, or ``disjoint-N`` with windows of ``N >= 2`` tokens.

    Raises:
        InputError: No protocol has that name; the message offers the nearest one.
    """
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    disjoint = re.fullmatch(r"disjoint-(\d{1,9})", name, flags=re.ASCII)
    if disjoint and int(disjoint[1]) >= 2:
        length = int(disjoint[1])
        return WindowProtocol(f"disjoint-{length}", length=length, stride=length)
    known = f"needed one of {', '.join(PROTOCOLS)}, disjoint-N with N >= 2, or {HARNESS}"
    hint = nearest(name, [*PROTOCOLS, "disjoint-512", HARNESS], otherwise="")
    raise InputError(f"unknown protocol {name!r}; {' '.join(filter(None, (hint, known)))}")
