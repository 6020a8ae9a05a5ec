"""Perplexity and accuracy of a causal language model by named protocols.

A perplexity without its protocol is not a number: the window, the stride, what is averaged and what is thrown away
change it by tens of per cent. Protocols are in ``evaluation.protocols``; scoring is the same for all of them
but ``lm-eval``, which has its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tensorfold.data.seen_text import overlaps, sentence
from tensorfold.data.text_forms import form_of
from tensorfold.data.tokens import Encoder, check_ids
from tensorfold.errors import InputError, TensorfoldError
from tensorfold.evaluation.protocols import HARNESS, Score, Window, get_protocol
from tensorfold.evaluation.protocols import PROTOCOLS as PROTOCOLS  # of old a name of this module
from tensorfold.models.anatomy import context_length
from tensorfold.models.modes import evaluation_mode
from tensorfold.models.sizes import stored_bytes
from tensorfold.utils.finite import why_not_finite
from tensorfold.utils.torch_modes import in_usual_modes
from tensorfold.utils.validation import check_types

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
        window: Tokens of text in a full window, as the protocol has it; None where it has no fixed length.
        prefix: Token ids that the tokenizer puts before a document, with which every window begins.
        seen: Texts that had a say in the model and are in this one: ``purpose`` (``calibration``, ``training``, or
            ``selection`` of a checkpoint), ``text``, and the ``share`` in common. Empty where none is known.
        bytes: Stored bytes of the whole model, orders and scales included.
        form: Of a text of wikitext's kind, ``raw`` or ``non-raw``, as found in it; see ``data.text_forms``.
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefix", tuple(self.prefix))  # JSON gives a list

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the field names, ready for JSON."""
        return {**asdict(self), "prefix": list(self.prefix)}

    def __str__(self) -> str:
        perplexity = f"{self.perplexity:.2f}" if self.perplexity < 1e5 else f"{self.perplexity:.2e}"
        form = f", {self.form}" if self.form else ""
        start = f", windows begin with token {' '.join(map(str, self.prefix))}" if self.prefix else ""
        line = (
            f"perplexity {perplexity}, accuracy {self.accuracy:.2%} "
            f"({self.protocol}{start}, {self.text}{form}, {self.tokens:,} tokens, {self.parameters:,} parameters)"
        )
        return "\n".join([line, *map(sentence, self.seen)])


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


@in_usual_modes
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
        tokenizer: The model's tokenizer; every window begins with what it puts before a document by default.
        text: The text itself (not its name: see :func:`tensorfold.data.texts.load_text`) or a list of documents.
            None for the protocol ``lm-eval``, whose tasks bring their own.
        protocol: A name that :func:`get_protocol` knows, or ``lm-eval``.
        max_tokens: Use only the first this many tokens of the text (``lambada``: the whole passages within them).
        batch_size: Windows in one forward pass.
        text_name: Label of the text in the result.
        progress: Called with (windows done, windows in all) after each forward pass.
        tasks, include_path, limit: For ``lm-eval`` only, see :func:`tensorfold.evaluation.lm_eval.evaluate_tasks`.

    Raises:
        InputError: Unknown protocol, text too short, a window longer than the model's context, or an argument that is
            not for this protocol.
        TensorfoldError: The model's logits make a loss that is NaN, or give a token of the text no probability at all.
    """
    start = time.perf_counter()
    check_types("evaluate", model=(model, nn.Module), protocol=(protocol, str), text=(text, str | Sequence | None))
    check_types("evaluate", max_tokens=(max_tokens, int | None), batch_size=(batch_size, int))
    check_judge(protocol, text, tasks, include_path, limit, max_tokens)
    if protocol == HARNESS:
        if text_name is not None or progress is not None:
            raise InputError("evaluate: text_name and progress have no effect here; they need a text, not lm-eval.")
        from tensorfold.evaluation.lm_eval import evaluate_tasks

        return evaluate_tasks(
            model, tokenizer, tasks or (), include_path=include_path, limit=limit, batch_size=batch_size
        )
    rule = get_protocol(protocol)
    documents = [text] if isinstance(text, str) else list(text or ())
    _check_arguments(documents, max_tokens, batch_size)
    positions = context_length(getattr(model, "config", None))
    if rule.context is not None and positions is not None and rule.context > positions:
        raise InputError(
            f"protocol {rule.name} needs a context of {rule.context} tokens, the model has "
            f"max_position_embeddings={positions}; use disjoint-{positions} or lambada"
        )
    encoder = Encoder(tokenizer)
    windows = rule.windows(encoder, documents, max_tokens, positions)
    check_ids(model, torch.cat([window.ids for window in windows]), "eval", tokenizer)
    parameters = list(model.parameters())
    device = parameters[0].device

    scores: list[Score] = []
    with evaluation_mode(model), torch.inference_mode():
        for first in range(0, len(windows), batch_size):
            try:
                scores += _score(model, windows[first : first + batch_size], device)
            except _NotFinite:
                raise TensorfoldError(
                    f"the model's logits are not numbers (NaN or infinite); {why_not_finite(model)}"
                ) from None
            if progress is not None:
                progress(len(scores), len(windows))
    nll, accuracy = rule.summarise(scores)
    if not nll < math.log(torch.finfo(torch.float64).max):
        raise TensorfoldError(
            f"mean negative log-likelihood of {nll} nats: the model gives a token of the text no probability at all; "
            f"{why_not_finite(model)}"
        )
    return Evaluation(
        perplexity=math.exp(nll),
        tokens=sum(score.tokens for score in scores),
        protocol=rule.name,
        text=text_name or f"{len(documents)} document(s) of {sum(map(len, documents))} characters",
        seconds=time.perf_counter() - start,
        parameters=sum(parameter.numel() for parameter in parameters),
        bytes=stored_bytes(model),
        accuracy=accuracy,
        device=str(device),
        dtype=next((str(p.dtype) for p in parameters if p.is_floating_point()), "unknown").removeprefix("torch."),
        window=rule.context,
        prefix=encoder.prefix,
        seen=overlaps(model, (window.ids[len(encoder.prefix) :].numpy() for window in windows)),
        form=form_of(documents),
    )


class _NotFinite(Exception):  # noqa: N818  (a signal, told as an error where the model is known)
    """Logits with NaN among them."""


def _check_arguments(documents: Sequence[str], max_tokens: int | None, batch_size: int) -> None:
    if not documents or not all(isinstance(document, str) for document in documents):
        raise InputError("text must be a string or a list of at least one string; load_text turns a name into one")
    if max_tokens is not None and max_tokens < 2:
        raise InputError(f"max_tokens={max_tokens}: needed at least 2, one token to predict from and one to predict")
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: needed at least 1 window in a forward pass")


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
            raise _NotFinite
        nll += losses.sum().item()
        correct += int((chunk.argmax(-1) == target).sum())
    return Score(nll, correct, len(targets))
