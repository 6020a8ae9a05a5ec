"""Text that a model writes itself, to calibrate, to heal and to be judged where there is no other.

Samples at temperature 1 are draws from the distribution that the dense model has learnt, so they weigh its inputs as
its training text did (LLM-QAT: Liu et al., arXiv 2305.17888, use them to train quantised models).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tensorfold.data.encode import tokenizer_fingerprint
from tensorfold.data.texts import describe, load_text, locate
from tensorfold.data.tokens import check_ids, prefix_of
from tensorfold.errors import InputError, TensorfoldError, pass_on_memory
from tensorfold.models.anatomy import context_length
from tensorfold.models.modes import evaluation_mode
from tensorfold.utils.atomic_files import cache_directory, write_file
from tensorfold.utils.fingerprints import hash_json, hash_model
from tensorfold.utils.finite import why_not_finite
from tensorfold.utils.terminal import progress_bar
from tensorfold.utils.torch_modes import forward_in_bfloat16, rounded_products
from tensorfold.utils.validation import check_types

SELF = "self"  # the name of this text, where a TEXT is asked for; a file of that name is ./self
LABEL = "text that the model wrote itself"

_ROWS = 32  # documents that are written at a time
_LENGTH = 256  # tokens of a document, at most
_DRAWS = "uniform, bfloat16"  # how; other ways have other documents in the cache
_BARREN = 8  # batches without a token after which a model is given up


def own_text(
    model: PreTrainedModel, tokenizer: Any, tokens: int = 24_000, seed: int = 0, *, progress: bool = False
) -> list[str]:
    """Documents that a model writes, sampled at temperature 1 from its own beginning of a text.

    A document ends with the end-of-text token, or after 256 tokens. The same model, tokenizer and seed give the same
    documents in the same order on one machine, and fewer tokens the first of them; they are kept in the user's cache.

    Args:
        model: A causal language model with a cache of keys and values; stays as it is.
        tokenizer: The model's.
        tokens: How many tokens the documents have together, at least; what they are tokenised to may differ by a few.
        seed: Seed of the draws.
        progress: Whether a progress bar is shown on standard error.

    Returns:
        The documents, without special tokens and in the order in which they were written.

    Raises:
        InputError: The tokenizer has no token that a text could begin with, or the model writes nothing.
        TensorfoldError: The model's logits are not finite.
    """
    check_types("own_text", model=(model, PreTrainedModel), tokens=(tokens, int), seed=(seed, int))
    start = _beginning(model, tokenizer)
    check_ids(model, torch.tensor(start), "own text", tokenizer)
    identity = {"model": hash_model(model), "tokenizer": tokenizer_fingerprint(tokenizer), "seed": seed}
    folder = cache_directory("own-text") / hash_json({**identity, "shape": [_ROWS, _LENGTH], "draws": _DRAWS})[:32]
    documents: list[str] = []
    written = barren = batch = 0
    bar = progress_bar("own text", progress)
    task = bar.add_task("", total=tokens)
    with bar:
        while written < tokens:
            found, count = _batch(folder / f"{batch:05d}.json", model, tokenizer, start, hash_json([seed, batch]))
            documents += found
            written, batch, barren = written + count, batch + 1, 0 if count else barren + 1
            bar.update(task, completed=written)
            if barren == _BARREN:
                raise InputError(
                    f"own text: the model wrote nothing in {_BARREN * _ROWS} attempts that began with token "
                    f"{' '.join(map(str, start))}; give a text."
                )
    return documents


def documents_of(
    texts: str | Sequence[str],
    model: PreTrainedModel,
    tokenizer: Any,
    tokens: int,
    *,
    split: str,
    progress: bool = False,
) -> list[list[str]]:
    """Documents of every TEXT, or those that the model writes itself where its name is ``self``.

    Args:
        texts: One or several, each as :func:`~tensorfold.data.texts.load_text` takes it, or ``self``.
        model, tokenizer, progress: As :func:`own_text` takes them.
        tokens: How many tokens are wanted, of all texts together and in equal shares.
        split: Split of a named text.

    Raises:
        InputError: As of the two.
    """
    names = _names(texts)
    share = -(-tokens // len(names))
    return [
        own_text(model, tokenizer, share, progress=progress) if name == SELF else load_text(name, split=split)
        for name in names
    ]


def check_named(texts: str | Sequence[str], split: str) -> None:
    """Raise :class:`InputError` where there is no such TEXT, or one is named twice; ``self`` is always right.

    For before a model is loaded.
    """
    names = _names(texts)
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"text {name!r} is given {names.count(name)} times; needed different ones.")
        if name != SELF:
            locate(name, split)


def label_of(texts: str | Sequence[str], split: str) -> str:
    """Names of TEXTs for results, as :func:`~tensorfold.data.texts.describe` gives them; of ``self`` in words."""
    return " and ".join(LABEL if name == SELF else describe(name, split) for name in _names(texts))


def _names(texts: str | Sequence[str]) -> list[str]:
    """The names of one TEXT or of several."""
    return [texts] if isinstance(texts, str) else list(texts)


def _beginning(model: PreTrainedModel, tokenizer: Any) -> tuple[int, ...]:
    """Token ids that a text begins with: what the tokenizer puts before one, else its own or the model's token."""
    if prefix := prefix_of(tokenizer):
        return prefix
    config = model.config.get_text_config(decoder=True)
    candidates = (getattr(where, f"{what}_token_id", None) for what in ("bos", "eos") for where in (tokenizer, config))
    first = next((token for token in candidates if isinstance(token, int)), None)
    if first is None:
        raise InputError("own text: neither tokenizer nor model has a beginning- or end-of-text token; give a text.")
    return (first,)


def _batch(
    file: Path, model: PreTrainedModel, tokenizer: Any, start: tuple[int, ...], seed: str
) -> tuple[list[str], int]:
    """Documents of one batch and the number of their tokens, from the file where they are in it already."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        return [str(document) for document in stored["documents"]], int(stored["tokens"])
    except (OSError, ValueError, KeyError, TypeError) as error:  # not there, or damaged
        pass_on_memory(error)
    rows = list(_sampled(model, tokenizer, start, seed))
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    documents, count = [text for text in texts if text.strip()], sum(map(len, rows))
    write_file(file, json.dumps({"tokens": count, "documents": documents}).encode())
    return documents, count


def _sampled(model: PreTrainedModel, tokenizer: Any, start: tuple[int, ...], seed: str) -> Iterator[list[int]]:
    """Token ids of one batch of documents, without those that they begin with and without the end-of-text token."""
    generator = torch.Generator().manual_seed(int(seed[:15], 16))
    known = max(tokenizer.get_vocab().values()) + 1  # tables may have more rows, for which there is no text
    end = tokenizer.eos_token_id
    length = min(_LENGTH, (context_length(model.config) or _LENGTH) - len(start))
    fed: Tensor = torch.tensor(start, device=model.device).expand(_ROWS, -1)  # (rows, tokens to read)
    cache: Any = None
    columns: list[Tensor] = []
    ended = torch.zeros(_ROWS, dtype=torch.bool)
    with evaluation_mode(model), torch.inference_mode(), rounded_products():
        forward = forward_in_bfloat16(model, input_ids=fed)
        while len(columns) < length and not ended.all():
            out = forward(input_ids=fed, past_key_values=cache, use_cache=True)
            logits, cache = out.logits[:, -1, :known].float().cpu(), out.past_key_values  # (rows, known)
            if not logits.isfinite().all():
                raise TensorfoldError(f"own text: the model's logits are not finite; {why_not_finite(model)}")
            # Which part of the unit interval a uniform draw falls in; torch.multinomial draws a number a token.
            upto = logits.softmax(-1).cumsum(-1)  # (rows, known)
            places = torch.rand(len(upto), 1, generator=generator) * upto[:, -1:]
            drawn = torch.searchsorted(upto, places, right=True).clamp_max(upto.shape[1] - 1)  # (rows, 1)
            columns.append(drawn)
            ended |= drawn[:, 0] == end if end is not None else False
            fed = drawn.to(model.device)
    for row in torch.cat(columns, dim=1).tolist() if columns else ():
        yield row[: row.index(end)] if end in row else row
