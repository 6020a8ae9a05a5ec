"""``tensorfold sample``: text from a model, token by token."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorfold.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 200


def sample(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id, local directory, .gguf file, or smollm2-135m.")
    ],
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help="Text to go on from. Default: the beginning-of-sequence token, or a newline."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens", min=1, help=f"How many new ones. Default: {_TOKENS}, or what the context has room for."
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="Divides the logits; 0 takes the likeliest token.")
    ] = 1.0,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="Draw from this many likeliest tokens. Default: from all.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Equal seeds give equal text.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")
    ] = False,
) -> None:
    """Generate text, printed as it comes."""
    import torch
    from transformers import TextStreamer

    from tensorfold.hf.sources import find_model

    source = find_model(model)
    loaded, tokenizer = source.model(), source.tokenizer()
    ids = _prompt_ids(tokenizer, prompt, loaded)
    count = _new_tokens(tokens, len(ids), loaded)
    drawn: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        drawn = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0}
    inputs = torch.tensor([ids], device=loaded.device)
    torch.manual_seed(seed)
    start = time.perf_counter()
    given = (
        loaded.eval()
        .generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=count,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=None if as_json else TextStreamer(tokenizer, skip_special_tokens=True),
            **drawn,
        )[0]
        .tolist()
    )
    seconds = time.perf_counter() - start
    if as_json:
        # Both decoded from their beginning: some tokenizers drop the space before the first word.
        before, whole = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids, given))
        result = {"text": whole.removeprefix(before), "prompt": before, "tokens": len(given) - len(ids)}
        typer.echo(json.dumps({**result, "seconds": seconds, "seed": seed}))


def _prompt_ids(tokenizer: Any, prompt: str | None, model: PreTrainedModel) -> list[int]:
    """Token ids of the prompt, at least one.

    Raises:
        InputError: There is nothing to go on from, or the tokenizer or the model does not know a token of it.
    """
    from tensorfold.tokens import Encoder

    encode = Encoder(tokenizer)
    if prompt is None and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    else:
        text = "\n" if prompt is None else prompt
        try:
            ids = encode(text)
        except Exception as error:  # the tokenizers library raises plain ones
            unknown = "".join(sorted(set(text) - tokenizer.get_vocab().keys()))
            raise InputError(
                f"sample: the tokenizer has no token for {unknown!r} ({error}); give a --prompt of characters it knows."
            ) from error
    if not ids:
        raise InputError(
            "sample: the prompt is empty; needed at least one token. Leave --prompt out, or give some text."
        )
    size = model.config.get_text_config().vocab_size
    if max(ids) >= size:
        raise InputError(
            f"sample: the tokenizer gives token id {max(ids)}, the model has {size} tokens; needed the tokenizer of "
            "this model beside it."
        )
    return ids


def _new_tokens(asked: int | None, prompt: int, model: PreTrainedModel) -> int:
    """How many tokens to generate.

    Raises:
        InputError: Prompt and new tokens are more than the model's context.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = None if context is None else context - prompt
    if room is not None and room < (asked or 1):
        raise InputError(
            f"sample: a prompt of {prompt} tokens and {asked or 1} new ones; the model has {context} positions. "
            + (f"Ask for at most {room} with --tokens." if room > 0 else "Give a shorter prompt.")
        )
    return asked or (_TOKENS if room is None else min(_TOKENS, room))
