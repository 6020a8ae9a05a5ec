"""Text to token ids, the same way for calibration, evaluation and training."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from tensorfold.errors import InputError

# Tokens beyond the wanted ones that a prefix of the text must give before its tokenisation is trusted.
_MARGIN = 64


def check_tokenizer(tokenizer: object) -> None:
    """Raise :class:`InputError` for what is no tokenizer, such as its name."""
    if not callable(tokenizer) or not (hasattr(tokenizer, "bos_token_id") or hasattr(tokenizer, "get_vocab")):
        raise InputError(
            f"got {tokenizer!r:.100} as a tokenizer; needed the model's, as AutoTokenizer.from_pretrained gives it."
        )


class Encoder:
    """Text to token ids, with a beginning-of-sequence token only where that is the tokenizer's default."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        check_tokenizer(tokenizer)
        self._tokenizer = tokenizer
        default = list(tokenizer("")["input_ids"])
        # Only that one: an end-of-sequence token in the default would cut the stream.
        self._start = default[:1] if default[:1] == [tokenizer.bos_token_id] else []

    def __call__(self, text: str) -> list[int]:
        # verbose=False: a stream is meant to be longer than the model's context.
        return self._start + list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def first(self, text: str, count: int | None) -> list[int]:
        """The first ``count`` tokens of ``self(text)``, without tokenising megabytes that are not used.

        Tokenisers split at white space before anything else, so a prefix that ends there has the tokens of the whole
        text. For those that do not, a margin keeps the cut away from the tokens that are used, and a longer prefix
        must agree; if it does not, the whole text is tokenised.
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
    """Last place up to ``at`` where a word ends, or ``at`` itself where there is none near."""
    for index in range(at, max(at - 1000, 0), -1):
        if text[index].isspace() and not text[index - 1].isspace():
            return index
    return at
