"""Whole models reading a prompt (prefill) and generating after it (decode), in turn with their rivals."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tensorfold.benchmark.timing import Clock, Timing, in_turn, waiting_for
from tensorfold.data.tokens import table_rows
from tensorfold.errors import InputError
from tensorfold.models.anatomy import context_length, is_plain_linear
from tensorfold.models.experts import fused_experts
from tensorfold.models.multiply_adds import shares
from tensorfold.nn import FoldedModule

PREFILL = 512


def set_ways(model: nn.Module, way: str | None) -> None:
    """Set the way of computing of every folded layer that can choose; None lets each choose by cost."""
    for module in model.modules():
        if isinstance(module, FoldedModule) and module.ways:
            module.way = way


@contextmanager
def ways_kept(model: nn.Module, way: str | None) -> Iterator[None]:
    """Set the way of every folded layer that can choose while the context is open; None leaves the layers' own."""
    before = {m: m.way for m in model.modules() if isinstance(m, FoldedModule) and m.ways}
    if way is not None:
        set_ways(model, way)
    try:
        yield
    finally:
        for module, own in before.items():
            module.way = own


def macs(module: nn.Module, tokens: int) -> float:
    """Multiply–adds a token of one layer, with work done once a forward divided by the number of tokens.

    Args:
        module: Any module; one that is neither folded nor a plain linear layer has none.
        tokens: Number of tokens of a forward.
    """
    if isinstance(module, FoldedModule):
        return module.macs(tokens)
    if is_plain_linear(module):
        assert isinstance(module.weight, Tensor)
        return module.weight.numel()
    return 0


def model_macs(model: nn.Module, tokens: int) -> float:
    """Multiply–adds a token of a model's linear and folded layers; attention over other tokens is not counted.

    Experts count as often as tokens are sent to them, see :mod:`tensorfold.models.multiply_adds`.
    """
    share = shares(model)
    tensors = sum(share(name) * each.tensor.numel() for name, each in fused_experts(model).items())
    return tensors + sum(share(name) * macs(module, tokens) for name, module in model.named_modules())


def size(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, shared ones once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def last_only(model: PreTrainedModel) -> dict[str, int]:
    """Keyword arguments with which a forward computes the logits of the last position alone; none if it cannot."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def is_folded(model: nn.Module) -> bool:
    """Whether any module of a model is folded."""
    return any(isinstance(module, FoldedModule) for module in model.modules())


def prompt(models: Sequence[PreTrainedModel], tokens: int) -> Tensor:
    """Random token ids that all of the models know, shape (1, tokens), equal at every call."""
    known = min(table_rows(model) or model.config.get_text_config().vocab_size for model in models)
    return torch.randint(known, (1, tokens), generator=torch.Generator().manual_seed(0)).to(models[0].device)


def prompt_length(models: Sequence[PreTrainedModel], prefill: int | None, decode: int) -> int:
    """Length of the prompt: the one asked for, else 512 or what the models' contexts leave room for.

    Args:
        models: Models that will read it.
        prefill: Length that is asked for, if any.
        decode: Number of tokens that will be decoded after it.

    Raises:
        InputError: Prompt and decoded tokens are more than a context.
    """
    contexts = [context_length(model.config) for model in models]
    context = min((context for context in contexts if context is not None), default=None)
    if context is None:
        return prefill or PREFILL
    room = context - decode
    if room < (prefill or 1):
        raise InputError(
            f"bench: a prompt of {prefill or 1} tokens and {decode} decoded ones; the context has {context} positions. "
            + (f"Ask for a prefill of at most {room}." if room > 0 else f"Decode fewer than {context} tokens.")
        )
    return prefill or min(PREFILL, room)


@torch.inference_mode()
def bench_models(
    models: Mapping[str, PreTrainedModel],
    ways: Mapping[str, str],
    prefill: int,
    decode: int,
    rounds: int,
    clock: Clock,
    advance: Callable[[], None],
) -> tuple[Timing, Timing | None]:
    """Time prefill and decode of whole models, taken in turn.

    Prefill fills the KV cache and computes the logits of the last position of a prompt, as ``generate`` does (of every
    position where a model cannot leave the others out); decode then feeds one token after the other. Everything has
    batch size 1.

    Args:
        models: Models by name; the first is called ``model``, and one model may have several names.
        ways: Way that every folded layer takes, for some of the names.
        prefill: Length of the prompt.
        decode: Number of tokens decoded after it.
        rounds: Samples of every model.
        clock: Seconds since any moment.
        advance: Called after every round of one model.

    Returns:
        Timings of prefill and decode; the second is None if a model has no KV cache to go on from.
    """
    ids = prompt(list(models.values()), prefill + decode)
    finish = waiting_for(ids.device)

    asked = {name: last_only(model) for name, model in models.items()}

    def once(name: str, count: int) -> tuple[float, float | None]:
        """Seconds of a prefill and of decoding a number of tokens after it; None without a KV cache."""
        model = models[name]
        with ways_kept(model, ways.get(name)):
            finish()
            start = clock()
            out = model(input_ids=ids[:, :prefill], use_cache=True, **asked[name])
            finish()
            between = clock()
            cache = getattr(out, "past_key_values", None)
            if cache is None:
                return between - start, None
            for position in range(prefill, prefill + count):
                out = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
            finish()
            return between - start, clock() - between

    def counted(tokens: int) -> dict[str, float]:
        """Multiply–adds a token of every model, the head at the last position alone where the model can do that."""
        result = {}
        for name, model in models.items():
            with ways_kept(model, ways.get(name)):
                head = model.get_output_embeddings() if asked[name] else None
                unused = 0.0 if head is None else macs(head, tokens) - macs(head, 1) / tokens
                result[name] = model_macs(model, tokens) - unused
        return result

    for name in models:
        once(name, 1)
    prefills: dict[str, list[float]] = {name: [] for name in models}
    decodes: dict[str, list[float | None]] = {name: [] for name in models}
    for name in in_turn(models, rounds):
        first, second = once(name, decode)
        prefills[name].append(first)
        decodes[name].append(second)
        advance()
    whole = {name: [value for value in values if value is not None] for name, values in decodes.items()}
    if not all(whole.values()):
        return Timing(prefill, prefills, counted(prefill)), None
    return Timing(prefill, prefills, counted(prefill)), Timing(decode, whole, counted(1))
