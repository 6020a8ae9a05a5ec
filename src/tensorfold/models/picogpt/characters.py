"""A tokenizer with one token a character."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tensorfold.errors import InputError


def character_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose tokens are the characters of a text, by code point: 65 for Tiny Shakespeare.

    There is no special token and none for what is unknown, so the vocabulary is the characters' and nothing else; a
    character that ``text`` lacks makes the tokenizer raise ("WordLevel error: Missing [UNK] token"), never drop it.
    Saved, it is a plain ``tokenizer.json`` that ``AutoTokenizer`` reads without this package.

    Healing ends documents with a blank line where a tokenizer has no end-of-sequence token: ``text`` needs a newline.

    Args:
        text: Text with every character that will occur.

    Raises:
        InputError: ``text`` is empty.
    """
    if not text:
        raise InputError("character_tokenizer: got an empty text; needed one with every character that will occur.")
    vocabulary = {character: index for index, character in enumerate(sorted(set(text)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
