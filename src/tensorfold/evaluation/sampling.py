"""Text from a model: a prompt's token ids, how many new ones fit, and the tokens themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tensorfold.data.tokens import Encoder, check_ids
from tensorfold.errors import InputError, pass_on_memory
from tensorfold.hf.loading import reason
from tensorfold.models.anatomy import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 200


def prompt_ids(tokenizer: Any, prompt: str | None, model: PreTrainedModel) -> list[int]:
    """Token ids of the prompt behind what the tokenizer puts before a document, at least one.

    Where the prompt is None, that alone, or the beginning-of-sequence token, or a newline.

    Raises:
        InputError: There is nothing to go on from, or the tokenizer or the model does not know a token of it.
    """
    encode = Encoder(tokenizer)
    if prompt is None and encode.prefix:
        ids = list(encode.prefix)
    elif prompt is None and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    else:
        text = "\n" if prompt is None else prompt
        try:
            ids = encode(text)
        except Exception as error:  # the tokenizers library raises plain ones
            pass_on_memory(error)
            unknown = "".join(sorted(set(text) - tokenizer.get_vocab().keys()))
            raise InputError(
                f"sample: the tokenizer has no token for {unknown!r} ({error}); give a --prompt of characters it knows."
            ) from error
    if not ids:
        raise InputError(
            "sample: the prompt is empty; needed at least one token. Leave --prompt out, or give some text."
        )
    check_ids(model, torch.tensor(ids), "sample", tokenizer)
    return ids


def new_tokens(asked: int | None, prompt: int, model: PreTrainedModel) -> int:
    """How many tokens to generate: those asked for, else :data:`TOKENS` or what the context has room for.

    Raises:
        InputError: Prompt and new tokens are more than the model's context.
    """
    room = context_room(prompt, model)
    if room is not None and room < (asked or 1):
        raise InputError(
            f"sample: a prompt of {prompt} tokens and {asked or 1} new ones; the model has {room + prompt} positions. "
            + (f"Ask for at most {room} with --tokens." if room > 0 else "Give a shorter prompt.")
        )
    return asked or (TOKENS if room is None else min(TOKENS, room))


def context_room(prompt: int, model: PreTrainedModel) -> int | None:
    """Positions left after a prompt; None where the model names no limit."""
    context = context_length(model.config)
    return None if context is None else context - prompt


def generate(model: PreTrainedModel, tokenizer: Any, ids: list[int], count: int, **options: Any) -> list[int]:
    """``ids`` and at most ``count`` tokens after them; ``options`` are those of transformers' ``generate``.

    The model is in evaluation mode afterwards.

    Raises:
        InputError: transformers cannot generate with what ``generation_config.json`` or the configuration asks for.
    """
    inputs = torch.tensor([ids], device=model.device)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    given = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs), "pad_token_id": padding, **options}
    try:
        found = model.eval().generate(max_new_tokens=count, return_dict_in_generate=False, **given)
    # Prompt and options are ours and have been checked; what is left are the checkpoint's own settings, of any type.
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError) as error:
        pass_on_memory(error)
        raise InputError(
            f"sample: transformers cannot generate with this model ({reason(error)}); see generation_config.json and "
            "config.json beside it."
        ) from error
    ids_found: list[int] = found[0].tolist()
    return ids_found


def continuation(tokenizer: Any, ids: list[int], given: list[int]) -> tuple[str, str]:
    """Prompt and what follows it; both decoded from their beginning, since some tokenizers drop the first space."""
    before, whole = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids, given))
    return before, whole.removeprefix(before)
