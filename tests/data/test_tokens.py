"""The first tokens of a long text are found without tokenising all of it."""

import functools

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from random_words import prose
from tensorfold.data.tokens import Encoder


class Spy:
    """A tokenizer that records how many characters it is given."""

    def __init__(self, tokenize) -> None:
        self.tokenize, self.lengths, self.bos_token_id = tokenize, [], None

    def __call__(self, text, **options):
        self.lengths.append(len(text))
        return {"input_ids": self.tokenize(text)}


@functools.cache
def trained(kind: str):
    tokenizer = Tokenizer(models.Unigram() if kind == "unigram" else models.BPE())
    special = {"special_tokens": ["<unk>"]}
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, **special)
    if kind == "byte-level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif kind == "unigram":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", show_progress=False, **special)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")  # tokens that span several words
    tokenizer.train_from_iterator([prose(300, seed=k) for k in range(30)], trainer)
    return lambda text: tokenizer.encode(text).ids


@pytest.mark.parametrize("kind", ["byte-level", "unigram", "no pre-tokeniser"])
@pytest.mark.parametrize("count", [2, 57, 1000])
def test_a_prefix_is_tokenised_as_the_whole_text_is(kind, count):
    tokenize = trained(kind)
    for text in (prose(40_000), prose(40_000).replace(" ", "     ").replace("\n", "\n \n")):
        spy = Spy(tokenize)
        assert Encoder(spy).first(text, count) == tokenize(text)[:count]
        assert sum(spy.lengths) < len(text)


@pytest.mark.parametrize("text", ["x" * 9000, prose(9000)])
def test_a_tokeniser_that_looks_at_the_whole_text_gets_it(text):
    def reversing(text):
        return [ord(c) + len(text) for c in text]

    assert Encoder(Spy(reversing)).first(text, 100) == reversing(text)[:100]


def test_few_tokens_from_many_characters_still_give_the_asked_for_count():
    def one_a_line(text):
        return [len(line) for line in text.splitlines(keepends=True)]

    text = "".join("word " * (20 + k % 7) + "\n" for k in range(3000))
    spy = Spy(one_a_line)
    assert Encoder(spy).first(text, 100) == one_a_line(text)[:100]
    assert max(spy.lengths) < len(text)
