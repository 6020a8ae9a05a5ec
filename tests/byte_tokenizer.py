"""Tokenizers of bytes for tests and studies: one that is nothing more, and a small one of byte pairs."""


class Bytes:
    """The smallest tokenizer there is: an id a byte, and 256 after each document."""

    eos_token_id = 256

    def get_vocab(self):
        return {str(byte): byte for byte in range(257)}

    def __call__(self, texts, **_):
        return {"input_ids": [list(text.encode()) for text in texts]}


def byte_pairs(texts, vocabulary, special, **tokens):
    """A byte-level BPE tokenizer of GPT-2's family, trained on ``texts``.

    Args:
        special: Tokens that come first in the vocabulary.
        tokens: What they stand for, as ``eos_token="</s>"``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **tokens)


def sentence_pairs(text):
    """Of 300 tokens; begins with ``<s>``, ends and pads with ``</s>``."""
    return byte_pairs([text], 300, ["<s>", "</s>"], bos_token="<s>", eos_token="</s>", pad_token="</s>")
