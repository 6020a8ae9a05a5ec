"""Perplexity and accuracy of a causal language model by named protocols.

A perplexity without its protocol is not a number: the window, the stride, what is averaged and what is thrown away
change it by tens of per cent. Each protocol is a row of :data:`PROTOCOLS`; it turns text into windows of token ids
and says how the scores of the windows become one mean. Scoring is the same for all of them.
"""

from __future__ import annotations

import difflib
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tensorfold.anatomy import context_length
from tensorfold.errors import InputError, TensorfoldError
from tensorfold.evaluation_mode import evaluation_mode
from tensorfold.strict import check_types
from tensorfold.tokens import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The protocol of lm-evaluation-harness, whose tasks bring text and windows of their own: tensorfold.harness.
HARNESS = "lm-eval"

# Positions whose logits are held in fp32 at once.
_CHUNK = 256


@dataclass(frozen=True)
class Evaluation:
    """Result of :func:`evaluate`.

    Args:
        perplexity: exp of the mean negative log-likelihood, averaged as the protocol says.
        tokens: Tokens that were predicted.
        protocol: Name of the protocol.
        text: Label of the text.
        seconds: Wall time, tokenisation included.
        parameters: Parameters of the whole model, shared ones once.
        accuracy: Share of the predicted tokens (``lambada``: of the passages, all target tokens at once) that are the
            argmax of the logits.
        device: Device the model ran on.
        dtype: Type of the model's floating-point parameters.
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the field names, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        perplexity = f"{self.perplexity:.2f}" if self.perplexity < 1e5 else f"{self.perplexity:.2e}"
        return (
            f"perplexity {perplexity}, accuracy {self.accuracy:.2%} "
            f"({self.protocol}, {self.text}, {self.tokens:,} tokens, {self.parameters:,} parameters)"
        )


@dataclass(frozen=True)
class Window:
    """Token ids of one forward pass, shape ``(length,)``; the last ``scored`` of them are predicted and count."""

    ids: Tensor
    scored: int


@dataclass(frozen=True)
class Score:
    """Summed negative log-likelihood (nats) and argmax hits over the scored tokens of one window."""

    nll: float
    correct: int
    tokens: int


@dataclass(frozen=True)
class WindowProtocol:
    """Windows over one stream: the documents joined by a blank line.

    With ``stride < length`` a window scores only the tokens that no window before it has scored, as in Hugging Face's
    sliding-window recipe. The first token of the stream, or of each disjoint window, has no context and is not scored.

    Args:
        name: Name in results.
        length: Tokens in a window.
        stride: Tokens from the start of one window to the next.
        mean_of_windows: Average the windows' means, not the tokens: a short tail then weighs as much as a full window.
        drop_tail: Leave out the last window where it is not full.
    """

    name: str
    length: int
    stride: int
    mean_of_windows: bool = False
    drop_tail: bool = False

    @property
    def context(self) -> int | None:
        """Positions the model must have."""
        return self.length

    def windows(
        self, encoder: Encoder, documents: Sequence[str], max_tokens: int | None, _: int | None
    ) -> list[Window]:
        """Windows in reading order; the stream is cut after its first ``max_tokens`` tokens."""
        stream = torch.tensor(encoder.first("\n\n".join(documents), max_tokens), dtype=torch.long)
        needed = self.length if self.drop_tail else 2
        if len(stream) < needed:
            raise InputError(
                f"text too short: got {len(stream)} tokens, protocol {self.name} needs at least {needed}; "
                f"give a longer text{', a larger max_tokens' if max_tokens else ''} or a shorter window (disjoint-N)"
            )
        windows, scored_until = [], 0
        for start in range(0, len(stream), self.stride):
            ids = stream[start : start + self.length]
            if self.drop_tail and len(ids) < self.length:
                break
            end = start + len(ids)
            scored = min(end - scored_until, len(ids) - 1)
            if scored > 0:
                windows.append(Window(ids, scored))
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
            # One more token than positions: the last is predicted and never fed.
            kept = ids if positions is None else ids[-(positions + 1) :]
            windows.append(Window(torch.tensor(kept, dtype=torch.long), min(scored, len(kept) - 1)))
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
        WindowProtocol("krony", length=1024, stride=1024, mean_of_windows=True),
        WindowProtocol("svd-llm", length=2048, stride=2048, drop_tail=True),
        LastWordProtocol("lambada"),
    )
}


def check_judge(
    protocol: str, text: object, tasks: object, include_path: object, limit: object, max_tokens: object
) -> None:
    """Raise :class:`InputError` unless the protocol is known, and what it is to judge by goes with it."""
    if protocol != HARNESS:
        get_protocol(protocol)
    of_text, of_tasks = (
        {"text": text, "max_tokens": max_tokens},
        {"tasks": tasks, "include_path": include_path, "limit": limit},
    )
    foreign = [name for name, value in (of_text if protocol == HARNESS else of_tasks).items() if value is not None]
    needed = "tasks (--tasks wikitext)" if protocol == HARNESS else "a text (--text); tasks are for protocol lm-eval"
    if foreign:
        raise InputError(f"protocol {protocol}: got {' and '.join(foreign)}, which it does not take; needed {needed}.")
    if (tasks if protocol == HARNESS else text) is None:
        raise InputError(f"protocol {protocol}: got nothing to judge by; needed {needed}.")


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


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str] | None = None,
    protocol: str = "hf-1024",
    *,
    max_tokens: int | None = None,
    batch_size: int = 1,
    text_name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    tasks: Sequence[str] | None = None,
    include_path: str | Path | None = None,
    limit: int | None = None,
) -> Evaluation:
    """Perplexity and accuracy of a causal language model on a text, where the model lies and in its own dtype.

    Args:
        model: Maps ``input_ids`` (batch, length) to ``.logits`` (batch, length, vocabulary). Its training mode is kept.
        tokenizer: The model's tokenizer; a beginning-of-sequence token is added where that is its default.
        text: The text itself (not its name: see :func:`tensorfold.texts.load_text`) or a list of documents.
            None for the protocol ``lm-eval``, whose tasks bring their own.
        protocol: A name that :func:`get_protocol` knows, or ``lm-eval``.
        max_tokens: Use only the first this many tokens of the text (``lambada``: the whole passages within them).
        batch_size: Windows in one forward pass.
        text_name: Label of the text in the result.
        progress: Called with (windows done, windows in all) after each forward pass.
        tasks, include_path, limit: For ``lm-eval`` only, see :func:`tensorfold.harness.evaluate_tasks`.

    Raises:
        InputError: Unknown protocol, text too short, a window longer than the model's context, or an argument that is
            not for this protocol.
        TensorfoldError: The model's logits are not finite numbers.
    """
    start = time.perf_counter()
    check_types("evaluate", model=(model, nn.Module), protocol=(protocol, str), text=(text, str | Sequence | None))
    check_types("evaluate", max_tokens=(max_tokens, int | None), batch_size=(batch_size, int))
    check_judge(protocol, text, tasks, include_path, limit, max_tokens)
    if protocol == HARNESS:
        from tensorfold.harness import evaluate_tasks

        return evaluate_tasks(
            model, tokenizer, tasks or (), include_path=include_path, limit=limit, batch_size=batch_size
        )
    rule = get_protocol(protocol)
    documents = [text] if isinstance(text, str) else list(text or ())
    _check_arguments(documents, max_tokens, batch_size)
    config: Any = getattr(model, "config", None)
    positions = context_length(config)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    if rule.context is not None and positions is not None and rule.context > positions:
        raise InputError(
            f"protocol {rule.name} needs a context of {rule.context} tokens, the model has "
            f"max_position_embeddings={positions}; use disjoint-{positions} or lambada"
        )
    windows = rule.windows(Encoder(tokenizer), documents, max_tokens, positions)
    _check_vocabulary(getattr(config, "vocab_size", None), windows)
    parameters = list(model.parameters())
    device = parameters[0].device

    scores: list[Score] = []
    with evaluation_mode(model), torch.inference_mode():
        for first in range(0, len(windows), batch_size):
            scores += _score(model, windows[first : first + batch_size], device)
            if progress is not None:
                progress(len(scores), len(windows))
    nll, accuracy = rule.summarise(scores)
    if not nll < math.log(torch.finfo(torch.float64).max):
        raise TensorfoldError(
            f"mean negative log-likelihood of {nll} nats: the model gives a token of the text no probability at all; "
            f"check the model's weights, or use a wider dtype"
        )
    return Evaluation(
        perplexity=math.exp(nll),
        tokens=sum(score.tokens for score in scores),
        protocol=rule.name,
        text=text_name or f"{len(documents)} document(s) of {sum(map(len, documents))} characters",
        seconds=time.perf_counter() - start,
        parameters=sum(parameter.numel() for parameter in parameters),
        accuracy=accuracy,
        device=str(device),
        dtype=next((str(p.dtype) for p in parameters if p.is_floating_point()), "unknown").removeprefix("torch."),
    )


def _check_arguments(documents: Sequence[str], max_tokens: int | None, batch_size: int) -> None:
    if not documents or not all(isinstance(document, str) for document in documents):
        raise InputError("text must be a string or a list of at least one string; load_text turns a name into one")
    if max_tokens is not None and max_tokens < 2:
        raise InputError(f"max_tokens={max_tokens}: needed at least 2, one token to predict from and one to predict")
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: needed at least 1 window in a forward pass")


def _check_vocabulary(size: int | None, windows: Sequence[Window]) -> None:
    largest = max(int(window.ids.max()) for window in windows)
    if size is not None and largest >= size:
        raise InputError(
            f"the tokenizer gives token id {largest}, the model has {size} tokens; use the tokenizer of this model"
        )


def _score(model: nn.Module, windows: Sequence[Window], device: torch.device) -> list[Score]:
    """Scores of one batch; shorter windows are padded at the end, where a causal model never looks back from."""
    length = max(len(window.ids) for window in windows) - 1  # the last token is predicted, not fed
    inputs = torch.zeros(len(windows), length, dtype=torch.long)
    for row, window in zip(inputs, windows, strict=True):
        row[: len(window.ids) - 1] = window.ids[:-1]
    logits = model(input_ids=inputs.to(device), use_cache=False).logits  # (windows, length, vocabulary)
    return [_score_window(row, window) for row, window in zip(logits, windows, strict=True)]


def _score_window(logits: Tensor, window: Window) -> Score:
    targets = window.ids[-window.scored :].to(logits.device)  # (scored,)
    end = len(window.ids) - 1
    nll, correct = 0.0, 0
    predictions = logits[end - window.scored : end]  # (scored, vocabulary)
    for chunk, target in zip(predictions.split(_CHUNK), targets.split(_CHUNK), strict=True):
        losses = functional.cross_entropy(chunk.float(), target, reduction="none").cpu().double()
        if losses.isnan().any():
            raise TensorfoldError(
                "the model's logits are not numbers (NaN or infinite): its weights are broken or its dtype is too "
                "narrow; check the weights, or load the model in float32 or bfloat16"
            )
        nll += losses.sum().item()
        correct += int((chunk.argmax(-1) == target).sum())
    return Score(nll, correct, len(targets))
