"""Text to token ids, for windows that begin with what the tokenizer puts before a document.

Calibration, evaluation and prompts use :class:`Encoder`; training text, which may be encoded in several processes, has
:class:`tensorfold.data.encode.StreamEncoder`. Windows for all four begin with :func:`prefix_of`: models that were
trained with a beginning-of-sequence token attend to it, and without it give other activations and much worse
predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tensorfold.errors import InputError, pass_on_memory

_MARGIN = 64  # tokens between the last one that is used and the place where a text is cut before tokenising
_PROBES = ("a", "0", ".", "\n")  # texts to look for what is put before them; the first that the tokenizer knows is used


def check_tokenizer(tokenizer: object) -> None:
    """Raise :class:`InputError` for an object that is no tokenizer, such as a tokenizer's name."""
    if not callable(tokenizer) or not (hasattr(tokenizer, "bos_token_id") or hasattr(tokenizer, "get_vocab")):
        raise InputError(
            f"got {tokenizer!r:.100} as a tokenizer; needed the model's, as AutoTokenizer.from_pretrained gives it."
        )


def prefix_of(tokenizer: Any) -> tuple[int, ...]:
    """Token ids that the tokenizer puts before a document by default: most often none or one.

    What it puts behind a document, such as an end-of-sequence token, is no part of it.
    """
    if not hasattr(tokenizer, "bos_token_id"):  # a mere map from text to ids
        return ()
    added = list(tokenizer("")["input_ids"])
    if not added:
        return ()
    for probe in _PROBES:
        try:
            bare = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
            whole = list(tokenizer(probe)["input_ids"])
        except Exception as error:  # the tokenizers library raises plain ones for characters that it does not know
            pass_on_memory(error)
            continue
        for start in range(len(whole) - len(bare) + 1):
            if bare and whole[start : start + len(bare)] == bare:
                return tuple(whole[:start])
    return tuple(added[:1]) if added[:1] == [tokenizer.bos_token_id] else ()


def begin(prefix: Sequence[int], text: Tensor) -> Tensor:
    """Put the prefix at the beginning of every window.

    Args:
        prefix: Token ids, as :func:`prefix_of` gives them.
        text: Token ids, shape (..., length).

    Returns:
        Token ids, shape (..., len(prefix) + length).
    """
    if not prefix:
        return text
    first = torch.tensor(prefix, dtype=text.dtype, device=text.device)
    return torch.cat([first.expand(*text.shape[:-1], -1), text], dim=-1)


def check_ids(model: nn.Module | int, ids: Tensor, what: str, tokenizer: Any = None) -> None:
    """Raise :class:`InputError`, naming the token and the remedy, unless the model has a row for each of ``ids``.

    Args:
        model: The model, or the number of rows of its table.
        ids: Token ids, of any shape.
        what: Name of the work that they are for, which the message begins with.
        tokenizer: The tokenizer that gave them, to show the token's text.
    """
    rows = model if isinstance(model, int) else table_rows(model)
    largest = int(ids.max()) if ids.numel() else 0
    if rows is None or largest < rows:
        return
    try:
        shown = f" ({tokenizer.convert_ids_to_tokens(largest)!r})" if tokenizer is not None else ""
    except Exception as error:  # the message does without the token's text
        pass_on_memory(error)
        shown = ""
    raise InputError(
        f"{what}: the tokenizer gives token id {largest}{shown}, but the model has {rows} tokens ({rows} rows in its "
        f"table); use the model's own tokenizer, or model.resize_token_embeddings({largest + 1}) on the dense model."
    )


def table_rows(model: nn.Module) -> int | None:
    """Number of token ids that a model can take in and predict; None where it does not say.

    The smallest of the rows of its input table, the rows of its head, and its configuration's ``vocab_size``.
    """
    ends = []
    for getter, size in (("get_input_embeddings", "num_embeddings"), ("get_output_embeddings", "out_features")):
        try:
            ends.append(getattr(getattr(model, getter)(), size, None))
        except (AttributeError, NotImplementedError):  # no model of transformers, or one that hides its table
            continue
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    named = [rows for rows in (*ends, getattr(config, "vocab_size", None)) if isinstance(rows, int)]
    return min(named, default=None)


class Encoder:
    """Text to token ids that begin with what the tokenizer puts before a document, and hold no other special tokens.

    Attributes:
        prefix: Token ids before every text; see :func:`prefix_of`.

    Raises:
        InputError: The object is no tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        check_tokenizer(tokenizer)
        self._tokenizer = tokenizer
        self.prefix = prefix_of(tokenizer)

    def __call__(self, text: str) -> list[int]:
        """Token ids of a text, the prefix first."""
        # verbose=False: no warning that the text is longer than the model's context, as it may be.
        return [*self.prefix, *self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    def first(self, text: str, count: int | None) -> list[int]:
        """The first ``count`` tokens of ``self(text)``, all where it is None, from as little text as gives them.

        Most tokenizers split at white space first, so the beginning of a text, cut at white space, has the tokens of
        the whole text. For others a margin of 64 tokens lies between the cut and the tokens that are used, and a longer
        beginning must give the same; if it does not, the whole text is tokenised.
        """
        if count is None:
            return self(text)
        characters = 6 * (count + _MARGIN)
        while 2 * characters < len(text):
            ids = self(text[: _cut(text, characters)])
            if len(ids) >= count + _MARGIN:
                longer = self(text[: _cut(text, characters + characters // 2)])
                if ids[:count] == longer[:count]:
                    return ids[:count]
                break
            characters *= 2
        return self(text)[:count]


def _cut(text: str, at: int) -> int:
    """The last place up to ``at`` where a word ends, or ``at`` where none of the 1000 characters before it is one."""
    for index in range(at, max(at - 1000, 0), -1):
        if text[index].isspace() and not text[index - 1].isspace():
            return index
    return at
