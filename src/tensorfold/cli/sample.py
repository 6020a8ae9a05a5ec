"""``tensorfold sample``: text from a model, token by token."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer

from tensorfold.cli.options import Device, Dtype, Json, Model


def sample(
    model: Model,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help="Text to go on from. Default: the beginning-of-sequence token, or a newline."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", min=1, help="How many new tokens. Default: 200, or what the context has room for."),
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="Divisor of the logits; 0 takes the likeliest token.")
    ] = 1.0,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="Draw from this many likeliest tokens. Default: from all.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Equal seeds give equal text.")] = 0,
    as_json: Json = False,
) -> None:
    """Generate text, printed as it comes."""
    import torch
    from transformers import TextStreamer

    from tensorfold.evaluation.sampling import continuation, generate, new_tokens, prompt_ids
    from tensorfold.export.engine_model import find_runnable

    source = find_runnable(model)
    loaded, tokenizer = source.model(None if dtype is None else dtype.value, device), source.tokenizer()
    ids = prompt_ids(tokenizer, prompt, loaded)
    count = new_tokens(tokens, len(ids), loaded)
    drawn: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        drawn = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0}
    torch.manual_seed(seed)
    start = time.perf_counter()
    streamer = None if as_json else TextStreamer(tokenizer, skip_special_tokens=True)
    given = generate(loaded, tokenizer, ids, count, streamer=streamer, **drawn)
    seconds = time.perf_counter() - start
    if as_json:
        before, text = continuation(tokenizer, ids, given)
        result = {"text": text, "prompt": before, "tokens": len(given) - len(ids)}
        typer.echo(json.dumps({**result, "seconds": seconds, "seed": seed}))
