"""``tensorfold sample``: text from any model, as a stream or as JSON."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tensorfold.models.picogpt import PicoGPTConfig, PicoGPTForCausalLM, character_tokenizer


@pytest.fixture(scope="module")
def characters(prose, tmp_path_factory):
    """A small PicoGPT and the tokenizer of the prose, side by side."""
    path = tmp_path_factory.mktemp("models") / "characters"
    tokenizer = character_tokenizer(prose)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 48}
    PicoGPTForCausalLM(PicoGPTConfig(vocab_size=len(tokenizer), initializer_range=0.2, **sizes)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_json_holds_the_text_and_nothing_else_is_printed(command, characters):
    outcome = command("sample", characters, "--prompt", "The quick", "--tokens", "20", "--seed", "5", "--json")
    assert outcome.status == 0, outcome.err
    result = json.loads(outcome.out)
    assert result.keys() == {"text", "prompt", "tokens", "seconds", "seed"}
    assert (result["prompt"], result["tokens"], result["seed"]) == ("The quick", 20, 5)
    assert len(result["text"]) == 20
    assert result["seconds"] > 0


def test_the_stream_is_the_prompt_and_the_text(command, characters):
    options = ("--prompt", "one\nbrown fox", "--tokens", "25", "--seed", "1")
    whole = json.loads(command("sample", characters, *options, "--json").out)
    assert command("sample", characters, *options).out == whole["prompt"] + whole["text"] + "\n"


def test_seeds_decide_the_text_unless_it_is_greedy(command, refused, characters):
    def text(*options):
        return json.loads(command("sample", characters, "--tokens", "30", "--json", *options).out)["text"]

    assert text("--seed", "1") == text("--seed", "1") != text("--seed", "2")
    greedy = text("--temperature", "0")
    assert greedy == text("--temperature", "0") == text("--top-k", "1") != text("--seed", "1")
    refused("sample", characters, "--temperature", "0", "--seed", "1", says=["--seed has no effect", "--temperature"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(characters), AutoTokenizer.from_pretrained(characters)
    ids = torch.tensor([tokenizer("\n")["input_ids"]])
    with torch.no_grad():
        for _ in range(30):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert tokenizer.decode(ids[0, 1:]) == greedy


def test_what_the_context_has_room_for_is_the_default(command, characters):
    outcome = command("sample", characters, "--prompt", "The old wall.", "--json")
    assert json.loads(outcome.out)["tokens"] == 48 - 13


def test_folded_models_with_a_beginning_token(command, folded_directory):
    outcome = command("sample", folded_directory, "--tokens", "6", "--json")
    assert outcome.status == 0, outcome.err
    result = json.loads(outcome.out)
    assert result["prompt"] == ""
    assert 1 <= result["tokens"] <= 6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--prompt", "{long}"], ["a prompt of 60 tokens", "48 positions", "shorter prompt"]),
        (["--prompt", "The", "--tokens", "46"], ["3 tokens and 46 new ones", "at most 45 with --tokens"]),
        (["--prompt", ""], ["prompt is empty", "at least one token"]),
        (["--prompt", "The §"], ["no token for '§'"]),
        (["--tokens", "0"], ["--tokens"]),
        (["--temperature", "-1"], ["--temperature"]),
        (["--top-k", "0"], ["--top-k"]),
    ],
)
def test_bad_requests_are_refused(refused, characters, options, says):
    refused("sample", characters, *(option.format(long="a" * 60) for option in options), says=says)


@pytest.mark.parametrize("options", [(), ("--temperature", "0"), ("--json",)])
def test_a_model_of_nan_is_called_that(command, characters, tmp_path, options):
    """Not its settings are at fault; and the likeliest of NaN would be the first token."""
    damaged = shutil.copytree(characters, tmp_path / "damaged")
    model = AutoModelForCausalLM.from_pretrained(damaged)
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if "norm" in name or "ln" in name).fill_(
            torch.nan
        )
    model.save_pretrained(damaged)
    outcome = command("sample", damaged, *options)
    assert outcome.status == 1
    assert "the model's logits are NaN" in outcome.err
    assert "holds NaN or infinity" in outcome.err


def test_a_tokenizer_of_another_model_is_refused(refused, characters, prose, edited):
    path = edited("dense")
    character_tokenizer("".join(map(chr, range(1000))) + prose).save_pretrained(path)
    refused("sample", path, "--prompt", chr(900), says=["token id 900", "the model has 300 tokens"])
