"""Perplexity and accuracy of a causal language model by named protocols.

A perplexity means nothing without its protocol: the window, the stride, what is averaged and what is left out change it
by tens of per cent. The protocols are in ``evaluation.protocols``. Scoring is the same for all of them but ``lm-eval``,
which has its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from tensorfold.data.seen_text import overlaps
from tensorfold.data.text_forms import form_of
from tensorfold.data.tokens import Encoder, check_ids
from tensorfold.errors import InputError, TensorfoldError
from tensorfold.evaluation.intervals import perplexity_interval
from tensorfold.evaluation.protocols import HARNESS, Score, Window, get_protocol
from tensorfold.evaluation.result import Evaluation
from tensorfold.models.anatomy import context_length
from tensorfold.models.modes import evaluation_mode
from tensorfold.models.sizes import stored_bytes, stored_parameters, stored_type
from tensorfold.utils.finite import why_not_finite
from tensorfold.utils.torch_modes import in_usual_modes
from tensorfold.utils.validation import check_types

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 256  # positions whose logits are held in fp32 at once


def check_judge(
    protocol: str, text: object, tasks: object, include_path: object, limit: object, max_tokens: object
) -> None:
    """Raise :class:`InputError` unless the protocol is known, and what is given fits it.

    The protocol ``lm-eval`` takes tasks, the others a text; arguments of the other kind have to be None.

    Args:
        protocol: Name of the protocol.
        text: Text, or its name.
        tasks: Names of tasks.
        include_path: Directory of further tasks.
        limit: Most documents of each task.
        max_tokens: How many tokens of the text are used.
    """
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
        raise InputError(f"protocol {protocol}: got nothing to evaluate on; needed {needed}.")


@in_usual_modes
def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str] | None = None,
    protocol: str = "hf-1024",
    *,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    text_name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    tasks: Sequence[str] | None = None,
    include_path: str | Path | None = None,
    limit: int | None = None,
) -> Evaluation:
    """Perplexity and accuracy of a causal language model on a text, on the model's own device and in its own dtype.

    Args:
        model: Maps ``input_ids`` (batch, length) to ``.logits`` (batch, length, vocabulary). It runs in evaluation
            mode, and is given back in the mode that it was in.
        tokenizer: The model's tokenizer; every window begins with what it puts before a document by default.
        text: The text itself, as one string or a list of documents; :func:`tensorfold.data.texts.load_text` reads one
            by its name. None for the protocol ``lm-eval``, whose tasks bring their own.
        protocol: A name that :func:`get_protocol` knows, or ``lm-eval``.
        max_tokens: How many tokens of the text are used, from its beginning (for ``lambada`` the whole passages within
            them); None for all.
        batch_size: Windows, or sequences of ``lm-eval``, in one forward pass; None for one window, and for as many
            sequences as :func:`tensorfold.evaluation.lm_eval.evaluate_tasks` says.
        text_name: Name of the text in the result.
        progress: Called after each forward pass with the number of windows done and that of all windows.
        tasks: Names of tasks for ``lm-eval``, see :func:`tensorfold.evaluation.lm_eval.evaluate_tasks`.
        include_path: Directory with YAML files of further tasks for ``lm-eval``.
        limit: Most documents of each task of ``lm-eval``.

    Raises:
        InputError: The protocol is unknown, the text too short, a window longer than the model's context, or an
            argument does not belong to the protocol.
        TensorfoldError: The model's logits hold NaN, or give a token of the text no probability at all.
    """
    start = time.perf_counter()
    check_types("evaluate", model=(model, nn.Module), protocol=(protocol, str), text=(text, str | Sequence | None))
    check_types("evaluate", max_tokens=(max_tokens, int | None), batch_size=(batch_size, int | None))
    check_judge(protocol, text, tasks, include_path, limit, max_tokens)
    if protocol == HARNESS:
        if text_name is not None or progress is not None:
            raise InputError("evaluate: text_name and progress have no effect here; they need a text, not lm-eval.")
        from tensorfold.evaluation.lm_eval import evaluate_tasks

        return evaluate_tasks(
            model, tokenizer, tasks or (), include_path=include_path, limit=limit, batch_size=batch_size
        )
    rule, batch_size = get_protocol(protocol), 1 if batch_size is None else batch_size
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
    device = parameters[0].device if parameters else torch.device("cpu")

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
    weighed = rule.weighed(scores)
    nll = sum(score.weight * score.nll / score.tokens for score in weighed)
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
        parameters=stored_parameters(model),
        bytes=stored_bytes(model),
        accuracy=rule.accuracy(scores),
        device=str(device),
        dtype=stored_type(model),
        window=rule.context,
        prefix=encoder.prefix,
        seen=overlaps(model, (window.ids[len(encoder.prefix) :].numpy() for window in windows)),
        form=form_of(documents),
        interval=perplexity_interval(weighed, nll),
        scores=weighed,
    )


class _NotFinite(Exception):  # noqa: N818  (a signal that becomes an error where the model is known)
    """A signal that logits hold NaN."""


def _check_arguments(documents: Sequence[str], max_tokens: int | None, batch_size: int) -> None:
    if not documents or not all(isinstance(document, str) for document in documents):
        raise InputError("text must be a string or a list of at least one string; load_text turns a name into one")
    if max_tokens is not None and max_tokens < 2:
        raise InputError(f"max_tokens={max_tokens}: needed at least 2, one token to predict from and one to predict")
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: needed at least 1 window in a forward pass")


def _score(model: nn.Module, windows: Sequence[Window], device: torch.device) -> list[Score]:
    """The scores of one batch of windows.

    Shorter windows are padded at their end, which does not change a causal model's logits at the positions before it.
    """
    length = max(len(window.ids) for window in windows) - 1  # the last token is predicted, not fed
    inputs = torch.zeros(len(windows), length, dtype=torch.long)
    for row, window in zip(inputs, windows, strict=True):
        row[: len(window.ids) - 1] = window.ids[:-1]
    logits = model(input_ids=inputs.to(device), use_cache=False).logits  # (windows, length, vocabulary)
    return [_score_window(row, window) for row, window in zip(logits, windows, strict=True)]


def _score_window(logits: Tensor, window: Window) -> Score:
    """The score of one window from its logits, shape (length, vocabulary), in chunks to bound memory in fp32."""
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
