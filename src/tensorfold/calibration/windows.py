"""Windows of equal length from a calibration text, and how often the text uses every token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tensorfold.data.tokens import Encoder, begin, check_ids
from tensorfold.errors import InputError

WINDOW = 1024  # tokens; most in a calibration window

# One text as its documents, or several texts, each a list of documents.
Documents = Iterable[str] | Iterable[Sequence[str]]


def texts_of(documents: Documents) -> list[list[str]]:
    """Texts as lists of documents; one where it is documents that are given.

    Raises:
        InputError: What is given is neither documents nor lists of them.
    """
    given = [documents] if isinstance(documents, str) else list(documents)
    if all(isinstance(each, str) for each in given):
        return [given]  # type: ignore[list-item]
    texts: list[Any] = [list(each) if isinstance(each, list | tuple) else [each] for each in given]
    if not all(isinstance(document, str) for text in texts for document in text):
        raise InputError("calibration: got what is no text; needed a list of documents, each a str, or several lists.")
    return texts


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase, documents: Documents, tokens: int, limit: int | None = None
) -> Tensor:
    """Windows of equal length cut from a text: from its beginning, or from places spread over its documents.

    A text of one document gives its first tokens. Of several, such as the files of a directory, as many as there are
    windows are begun, evenly spaced through the list, so that each kind of text has its share; a document that is too
    short goes on with the next ones, joined by blank lines. Several texts have equal shares of the windows, as far as
    each is long enough, in the order in which they are given. Every window begins with what the tokenizer puts before a
    document, which counts as part of it. Lengths are equal so that one attention mask serves all windows.

    Args:
        tokenizer: The model's tokenizer.
        documents: The documents of a text before tokenising, or a list of them for each of several texts.
        tokens: Tokens in all windows together, or a few less where they do not divide evenly.
        limit: Most tokens of a window beside :data:`WINDOW`, such as the model's context length.

    Returns:
        Token ids, int64, shape (windows, length).

    Raises:
        InputError: The text is too short, or ``tokens`` or ``limit`` leaves no room for text.
    """
    length = min(WINDOW, limit or WINDOW)
    encoder = Encoder(tokenizer)
    opening = len(encoder.prefix)
    if tokens < max(2, opening + 1):
        raise InputError(f"calibration: tokens={tokens}; needed at least {max(2, opening + 1)}.")
    if length <= opening:
        raise InputError(
            f"calibration: windows of {length} tokens, and the tokenizer puts {opening} before every document; needed "
            "a model with a longer context."
        )
    texts = texts_of(documents)
    count, each = _division(tokens, length, opening, len(texts))
    ids = _spread(encoder, texts, count, each)
    found = opening + len(ids)
    if found < min(tokens, length) and len(ids) < count * each:
        raise InputError(
            f"calibration: the text has {found} tokens; needed at least {min(tokens, length)}. Give a longer text."
        )
    if len(ids) < count * each:
        count, each = _division(found, length, opening)
    text = torch.tensor(ids)[: count * each].reshape(count, each)  # without the prefix
    return begin(encoder.prefix, text)


def _division(tokens: int, length: int, opening: int, texts: int = 1) -> tuple[int, int]:
    """How many windows ``tokens`` make, and how many tokens of text each holds behind its prefix of ``opening``.

    As many as there are texts at least, where the tokens suffice.
    """
    count = min(max(-(-tokens // length), texts), tokens // (opening + 1))
    return count, min(tokens // count, length) - opening


def _spread(encoder: Encoder, given: list[list[str]], count: int, each: int) -> list[int]:
    """Token ids of ``count`` windows of ``each`` tokens, without prefix, from stretches spread over every text.

    Stretches of a text have equally many windows, or one more, and so have the texts; what a stretch is too short for
    is made up for by the others. Fewer ids where all are too short.
    """
    opening = len(encoder.prefix)
    texts: list[str] = []
    wanted: list[int] = []
    for k, documents in enumerate(given):
        share = count // len(given) + (k < count % len(given))
        stretches = max(1, min(len(documents), share))
        starts = [j * len(documents) // stretches for j in range(stretches + 1)]
        texts += ["\n\n".join(documents[a:b]) for a, b in pairwise(starts)]
        wanted += [(share // stretches + (j < share % stretches)) * each for j in range(stretches)]
    found: list[list[int]] = [[] for _ in texts]
    longer = list(range(len(texts)))  # those that may have more
    while longer:
        for k in longer:
            found[k] = encoder.first(texts[k], opening + wanted[k])[opening:]
        lack = count * each - sum(map(len, found))
        longer = [k for k in longer if len(found[k]) == wanted[k]] if lack else []
        for place, k in enumerate(longer):
            wanted[k] += lack // len(longer) + (place < lack % len(longer))
    return [token for ids in found for token in ids]


def token_counts(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], vocabulary: int) -> Tensor:
    """Counts of the tokens in a text, int64, shape (vocabulary,).

    Special tokens get the count of the most frequent token: chats and documents are built of them, but plain text
    holds none.

    Args:
        tokenizer: The model's tokenizer.
        documents: The text before tokenising.
        vocabulary: Rows of the model's table.

    Raises:
        InputError: The tokenizer gives a token that the vocabulary lacks.
    """
    counts = torch.zeros(vocabulary, dtype=torch.int64)
    encoder = Encoder(tokenizer)
    for document in documents:
        ids = torch.tensor(encoder(document), dtype=torch.int64)
        check_ids(vocabulary, ids, "calibration", tokenizer)
        counts += ids.bincount(minlength=vocabulary)
    special = [index for index in tokenizer.all_special_ids if index < vocabulary]
    counts[special] = counts.max()
    return counts
