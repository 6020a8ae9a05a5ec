"""Each protocol against a reference that shares no code with it: Hugging Face's recipe and plain loops."""

import json
import math
import string
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from random_words import prose
from tensorfold.errors import InputError, TensorfoldError
from tensorfold.evaluation.perplexity import evaluate
from tensorfold.evaluation.protocols import PROTOCOLS, get_protocol
from tensorfold.evaluation.result import Evaluation

CHARACTERS = ["<s>", "</s>", "<unk>", *string.printable]
VOCABULARY = len(CHARACTERS)


def character_tokenizer(*, template: str | None = None, model_max_length: int = 64) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", model_max_length=model_max_length
    )


def gpt2(positions: int = 2048) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=positions, n_embd=16, n_layer=1, n_head=2, initializer_range=0.4,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=2048, hidden_size=16, intermediate_size=24,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.4,
    )  # fmt: skip
    return LlamaForCausalLM(config)


FAMILIES = {"gpt2": gpt2, "llama": llama}


@pytest.fixture(params=FAMILIES)
def model(request):
    return FAMILIES[request.param]().eval()


PASSAGES = [prose(60 + 17 * k, seed=k) + " " + word for k, word in enumerate(["on", "star", "hen", "rattan", "a"])]


def ids_of(text: str) -> list[int]:
    return [CHARACTERS.index(c) for c in text]


def hugging_face_windows(model, ids: list[int], length: int, stride: int) -> list[tuple[float, int]]:
    """Mean loss and number of predicted tokens of each window, by the recipe of transformers' page on perplexity."""
    windows, previous_end = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        inputs = torch.tensor([ids[begin:end]])
        labels = inputs.clone()
        labels[:, : -(end - previous_end)] = -100
        predicted = int((labels[:, 1:] != -100).sum())
        if predicted:
            with torch.no_grad():
                windows.append((model(inputs, labels=labels).loss.item(), predicted))
        previous_end = end
        if end == len(ids):
            break
    return windows


def token_weighted(windows: list[tuple[float, int]]) -> tuple[float, int]:
    tokens = sum(n for _, n in windows)
    return math.exp(sum(loss * n for loss, n in windows) / tokens), tokens


@pytest.mark.parametrize(
    ("protocol", "length", "stride"),
    [("hf-1024", 1024, 1024), ("hf-512", 1024, 512), ("disjoint-100", 100, 100), ("disjoint-2", 2, 2)],
)
@pytest.mark.parametrize("characters", [2, 99, 1025, 1026, 2300])
def test_windows_follow_hugging_faces_recipe(model, protocol, length, stride, characters):
    text = prose(min(characters, 12 * length + 1))
    expected, tokens = token_weighted(hugging_face_windows(model, ids_of(text), length, stride))
    result = evaluate(model, character_tokenizer(), text, protocol, batch_size=2 if length > 100 else 64)
    assert result.perplexity == pytest.approx(expected, rel=1e-5)
    assert result.tokens == tokens
    assert result.protocol == protocol


def test_hf_512_scores_every_token_but_the_first(model):
    assert evaluate(model, character_tokenizer(), prose(2300), "hf-512").tokens == 2299


@pytest.mark.parametrize("characters", [2050, 2049, 900])
def test_krony_averages_windows_not_tokens(model, characters):
    text = prose(characters)
    windows = hugging_face_windows(model, ids_of(text), 1024, 1024)
    result = evaluate(model, character_tokenizer(), text, "krony")
    assert result.perplexity == pytest.approx(math.exp(sum(loss for loss, _ in windows) / len(windows)), rel=1e-5)
    assert result.tokens == sum(n for _, n in windows)
    if characters == 2050:  # a tail of one prediction weighs as much as 1023
        assert len(windows) == 3
        assert result.perplexity != pytest.approx(token_weighted(windows)[0], rel=1e-3)


def test_svd_llm_drops_the_tail(model):
    text = prose(2 * 2048 + 900)
    expected, _ = token_weighted(hugging_face_windows(model, ids_of(text)[:4096], 2048, 2048))
    result = evaluate(model, character_tokenizer(), text, "svd-llm")
    assert result.perplexity == pytest.approx(expected, rel=1e-5)
    assert result.tokens == 2 * 2047


def last_word(model, passage: str, start: list[int]) -> tuple[float, bool, int]:
    """Summed log-likelihood, whether all are the argmax, and number of the tokens of " word", position by position."""
    context, _, word = passage.rpartition(" ")
    ids, total, right = start + ids_of(context), 0.0, True
    for target in ids_of(" " + word):
        with torch.no_grad():
            log_probabilities = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        total += log_probabilities[target].item()
        right &= int(log_probabilities.argmax()) == target
        ids.append(target)
    return total, right, len(word) + 1


@pytest.mark.parametrize("template", [None, "<s> $A"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_lambada_scores_the_last_word(model, template, batch_size):
    expected = [last_word(model, passage, [0] if template else []) for passage in PASSAGES]
    result = evaluate(
        model, character_tokenizer(template=template), [p + "\n" for p in PASSAGES], "lambada", batch_size=batch_size
    )
    assert result.perplexity == pytest.approx(math.exp(-sum(total for total, _, _ in expected) / 5), rel=1e-5)
    assert result.accuracy == sum(right for _, right, _ in expected) / 5
    assert result.tokens == sum(tokens for _, _, tokens in expected)


class Constant(torch.nn.Module):
    """A model that always predicts ``next_token[last token]``, for accuracies that are known in advance."""

    def __init__(self, next_token: dict[str, str]) -> None:
        super().__init__()
        table = torch.zeros(VOCABULARY, VOCABULARY)
        for token, follower in next_token.items():
            table[CHARACTERS.index(token), CHARACTERS.index(follower)] = 5.0
        self.table = torch.nn.Parameter(table)

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.table[input_ids])


def test_accuracy_is_the_share_of_right_argmaxes():
    model = Constant({"a": "b", "b": "a", " ": "a"})
    result = evaluate(model, character_tokenizer(), "ababacaba", "disjoint-9")
    assert result.accuracy == 6 / 8  # not a -> c, nor c -> a
    passages = ["ba aba", "ba a", "ba abc", "b ba"]  # " " is never expected after a or b
    assert evaluate(model, character_tokenizer(), passages, "lambada").accuracy == 0
    model = Constant({"a": " ", " ": "b", "b": "c"})
    assert evaluate(model, character_tokenizer(), ["a b", "a bc", "a bb", "a a"], "lambada").accuracy == 2 / 4


def test_lambada_gives_the_spaces_before_the_word_to_the_target():
    model = Constant({})
    assert evaluate(model, character_tokenizer(), ["ab   cd"], "lambada").tokens == 5


def test_lambada_cuts_the_beginning_of_a_long_passage():
    model = gpt2(positions=32).eval()
    passage = PASSAGES[0]
    with torch.no_grad():
        kept = ids_of(passage)[-33:]
        logits = model(torch.tensor([kept[:-1]])).logits[0].log_softmax(-1)
    expected = -sum(logits[k - 1, kept[k]].item() for k in range(30, 33))  # " on"
    assert evaluate(model, character_tokenizer(), [passage], "lambada").perplexity == pytest.approx(
        math.exp(expected), rel=1e-5
    )


def test_documents_are_joined_by_a_blank_line(model):
    documents = [prose(500, seed=k) for k in range(4)]
    joined = evaluate(model, character_tokenizer(), "\n\n".join(documents), "hf-1024")
    assert evaluate(model, character_tokenizer(), documents, "hf-1024").perplexity == joined.perplexity


@pytest.mark.parametrize("protocol", ["hf-1024", "hf-512", "krony", "svd-llm", "disjoint-300"])
def test_batches_do_not_change_the_result(model, protocol):
    one, many = (evaluate(model, character_tokenizer(), prose(7000), protocol, batch_size=n) for n in (1, 4))
    assert many.perplexity == pytest.approx(one.perplexity, rel=1e-5)
    assert (many.tokens, many.accuracy) == (one.tokens, pytest.approx(one.accuracy, abs=1e-3))


@pytest.mark.parametrize("max_tokens", [2, 900, 1500])
def test_max_tokens_keeps_the_first_ones(model, max_tokens):
    text = prose(20_000)
    short = evaluate(model, character_tokenizer(), text[:max_tokens])
    result = evaluate(model, character_tokenizer(), text, max_tokens=max_tokens)
    assert (result.perplexity, result.tokens) == (short.perplexity, short.tokens)


def test_max_tokens_keeps_whole_passages(model):
    lengths = [len(passage) for passage in PASSAGES]
    for whole, max_tokens in [(2, sum(lengths[:3]) - 1), (3, sum(lengths[:3]))]:
        expected = evaluate(model, character_tokenizer(), PASSAGES[:whole], "lambada")
        result = evaluate(model, character_tokenizer(), PASSAGES, "lambada", max_tokens=max_tokens)
        assert (result.perplexity, result.tokens) == (expected.perplexity, expected.tokens)
    with pytest.raises(InputError, match=f"max_tokens=20.*at least {lengths[0]}"):
        evaluate(model, character_tokenizer(), PASSAGES, "lambada", max_tokens=20)


def test_a_start_token_is_added_where_that_is_the_default_and_an_end_token_never(model):
    text = prose(300)
    expected, tokens = token_weighted(hugging_face_windows(model, [0, *ids_of(text)], 1024, 1024))
    result = evaluate(model, character_tokenizer(template="<s> $A </s>"), text)
    assert result.perplexity == pytest.approx(expected, rel=1e-5)
    assert result.tokens == tokens == 300


def test_long_texts_raise_no_length_warning(model):
    warned = "sequence-length-is-longer-than-the-specified-maximum"
    tokenizer = character_tokenizer(model_max_length=64)
    evaluate(model, tokenizer, prose(3000))
    assert warned not in tokenizer.deprecation_warnings
    tokenizer(prose(3000))
    assert warned in tokenizer.deprecation_warnings


def test_losses_are_taken_in_fp32():
    model = gpt2().eval().to(torch.bfloat16)
    text = prose(1000)
    ids = torch.tensor(ids_of(text))
    with torch.no_grad():
        log_probabilities = model(ids[None, :-1]).logits[0].double().log_softmax(-1)
    expected = math.exp(-log_probabilities.gather(1, ids[1:, None]).mean().item())
    result = evaluate(model, character_tokenizer(), text)
    assert result.perplexity == pytest.approx(expected, rel=1e-5)
    assert result.dtype == "bfloat16"


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_count_a_tied_head_once(family):
    model = FAMILIES[family]()
    distinct = {p.data_ptr(): p.numel() for _, p in model.named_parameters(remove_duplicate=False)}
    result = evaluate(model, character_tokenizer(), "some text")
    assert result.parameters == sum(distinct.values())
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (family == "gpt2")


def test_training_mode_is_suspended_and_restored_module_by_module():
    model = gpt2()
    model.train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    noisy = evaluate(model, character_tokenizer(), prose(500))
    assert [module.training for module in model.modules()] == before
    assert noisy.perplexity == evaluate(model.eval(), character_tokenizer(), prose(500)).perplexity


def test_training_mode_is_restored_after_a_failure():
    model = gpt2().train()
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(TensorfoldError):
        evaluate(model, character_tokenizer(), prose(500))
    assert all(module.training for module in model.modules())


def test_progress_ends_at_the_number_of_windows(model):
    calls = []
    evaluate(
        model, character_tokenizer(), prose(450), "disjoint-100", batch_size=2, progress=lambda *c: calls.append(c)
    )
    assert calls == [(2, 5), (4, 5), (5, 5)]


def test_the_result_is_printed_with_its_protocol_text_and_tokens(model):
    result = evaluate(model, character_tokenizer(), prose(2000), "hf-512", text_name="prose-test")
    for part in (f"{result.perplexity:.2f}", "hf-512", "prose-test", "1,999 tokens"):
        assert part in str(result)
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()
    assert {"perplexity", "tokens", "protocol", "text", "seconds", "parameters"} <= result.to_dict().keys()
    assert Evaluation(**result.to_dict()) == result
    assert "2000 characters" in evaluate(model, character_tokenizer(), prose(2000)).text


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused(value):
    model = Constant({})
    model.table.data[:, 5] = value
    with pytest.raises(TensorfoldError, match="not numbers") as error:
        evaluate(model, character_tokenizer(), "abc")
    assert not isinstance(error.value, InputError)


def test_a_token_without_probability_is_refused():
    model = Constant({})
    model.table.data[:, CHARACTERS.index("b")] = -math.inf
    with pytest.raises(TensorfoldError, match="no probability"):
        evaluate(model, character_tokenizer(), "abc")
    assert evaluate(model, character_tokenizer(), "acca").perplexity == pytest.approx(VOCABULARY - 1)


@pytest.mark.parametrize("protocol", ["hf-1024", "hf-512", "krony", "svd-llm", "disjoint-65"])
def test_a_window_longer_than_the_models_context_is_refused(protocol):
    length = get_protocol(protocol).context
    with pytest.raises(
        InputError, match=f"{protocol}.*{length}.*max_position_embeddings=64; use disjoint-64 or lambada"
    ):
        evaluate(gpt2(positions=64), character_tokenizer(), prose(5000), protocol)
    evaluate(gpt2(positions=64), character_tokenizer(), prose(100), "disjoint-64")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "too short: got 0 tokens.*at least 2"),
        ("a", {}, "too short: got 1 tokens.*at least 2"),
        ("a" * 2047, {"protocol": "svd-llm"}, "got 2047 tokens, protocol svd-llm needs at least 2048"),
        ("a" * 9999, {"protocol": "svd-llm", "max_tokens": 2000}, "got 2000 tokens.*a larger max_tokens"),
        ([], {}, "list of at least one"),
        (["a", 3], {}, "list of at least one"),
        ("abc", {"max_tokens": 1}, "max_tokens=1: needed at least 2"),
        ("abc", {"batch_size": 0}, "batch_size=0"),
        ("abc", {"protocol": "hf-1042"}, "unknown protocol 'hf-1042'; did you mean 'hf-1024'"),
        ("abc", {"protocol": "lambda"}, "did you mean 'lambada'"),
        ("abc", {"protocol": "disjoint-1"}, "disjoint-N with N >= 2"),
        ("abc", {"protocol": ""}, "needed one of hf-1024, hf-512, krony, svd-llm, lambada"),
        (["a b", "word"], {"protocol": "lambada"}, r"passage 2 \('word'\) has no last word"),
        ([" word"], {"protocol": "lambada"}, r"passage 1 \('\ word'\) has no last word"),
    ],
)
def test_bad_input_is_refused(text, options, message):
    with pytest.raises(InputError, match=message):
        evaluate(gpt2(), character_tokenizer(), text, **options)


def test_the_tokenizer_of_another_model_is_refused():
    model = gpt2()
    model.config.vocab_size = 20
    with pytest.raises(InputError, match=r"token id .*the model has 20 tokens"):
        evaluate(model, character_tokenizer(), "some text")


def test_the_table_is_keyed_by_name():
    assert all(get_protocol(name).name == name for name in PROTOCOLS)
    assert {"hf-1024", "hf-512", "krony", "svd-llm", "lambada"} == set(PROTOCOLS)
