"""The output side of calibration: second moments of the loss's gradient, from one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from tensorfold.calibration.block_calls import forward_replaced
from tensorfold.calibration.packed_symmetric import Packed
from tensorfold.data.tokens import begin, check_ids
from tensorfold.errors import InputError
from tensorfold.models.anatomy import blocks
from tensorfold.utils.finite import why_not_finite

# Tokens in a backward pass: their logits are held, and the activations of one block at a time.
_WINDOW = 256


def gradient_moments(
    model: PreTrainedModel, windows: Tensor, modules: Mapping[str, nn.Module], prefix: int = 0
) -> dict[str, Packed]:
    """For each module ``G = Σ g gᵀ / tokens``, (out, out), with g the gradient of the loss at an output vector.

    The loss is that of the text itself, ``Σ −log p(next token)`` in nats over a window: the empirical Fisher. An output
    that is off by δ at a token then costs about ``½ δᵀ G δ`` nats. A module that is never called has none, such as
    an expert that no token is sent to.

    Args:
        windows: Token indices, shape (windows, length); their text is cut into pieces of 256.
        modules: By name; what they return is the vector itself, shape (..., out).
        prefix: How many tokens at the beginning of a window are what the tokenizer puts before a document. Every piece
            begins with them; they are context, and the loss is of the text behind them without its first token.

    Raises:
        InputError: The gradients at a module hold NaN or infinity.
    """
    sums: dict[str, Packed] = {}
    check_ids(model, windows, "calibration")
    pieces = [
        begin(row[:prefix].tolist(), part)
        for parts in windows[:, prefix:].to(model.device).split(_WINDOW, dim=1)
        for row, part in zip(windows, parts, strict=True)
    ]

    def watch(name: str) -> Callable[..., Any]:
        def add(gradient: Tensor) -> None:
            flat = gradient.detach().reshape(-1, gradient.shape[-1]).float()
            if name not in sums:
                sums[name] = Packed(flat.shape[-1], flat.device)
            sums[name].add(flat)

        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(add)

        return hook

    def root(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_().clone()  # of a leaf, some models' work in place is refused

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as hooks, torch.enable_grad():
        # Only activations need gradients; those of the weights would be as large as the model.
        for parameter in trained:
            parameter.requires_grad_(False)
        hooks.callback(lambda: [parameter.requires_grad_() for parameter in trained])
        hooks.callback(model.get_input_embeddings().register_forward_hook(root).remove)
        for name, module in modules.items():
            hooks.callback(module.register_forward_hook(watch(name)).remove)
        hooks.enter_context(_recomputing(model))
        for piece in pieces:
            logits = next_token_logits(model, piece[None])
            logits.backward(_gradient_at(logits, piece, prefix))
    for name, moment in sums.items():
        if not torch.isfinite(moment.values).all():
            raise InputError(f"{name}: the loss's gradients there hold NaN or infinity; {why_not_finite(model)}.")
        moment.divide(sum(len(piece) for piece in pieces))
    return sums


def next_token_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits (1, length, vocabulary) of tokens (1, length).

    Raises:
        InputError: The model has another head than a language model's, or none.
    """
    logits = getattr(model(ids, use_cache=False), "logits", None)
    table = model.get_input_embeddings()
    few = getattr(table, "num_embeddings", 0) // 2  # labels; Mllama's table has some rows more than its head
    if not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape or logits.shape[-1] < few:
        shown = "no logits" if not isinstance(logits, Tensor) else f"logits of shape {tuple(logits.shape)}"
        raise InputError(
            f"{type(model).__name__} gives {shown} for {ids.shape[-1]} tokens, so text has no loss to divide a budget "
            "or fit a table by; needed a causal language model (AutoModelForCausalLM). Fold that one, take a method "
            "with a rank or keep of its own such as low-rank, or fold without calibration text."
        )
    return logits


@torch.no_grad()
def _gradient_at(logits: Tensor, piece: Tensor, prefix: int) -> Tensor:
    """Of ``Σ −log p(next token)`` at logits (1, length, vocabulary): two tables of that size instead of four.

    What the ``prefix`` tokens at the beginning predict does not count.
    """
    gradient = logits.float().softmax(-1)
    gradient[0, torch.arange(len(piece) - 1, device=piece.device), piece[1:]] -= 1
    gradient[0, -1] = 0
    gradient[0, :prefix] = 0
    return gradient.to(logits.dtype)


@contextmanager
def _recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Blocks whose inputs alone are kept for the backward pass, whatever the architecture offers itself."""
    try:
        chain = list(blocks(model)[1])
    except InputError:
        chain = []
    with ExitStack() as replaced:
        for block in chain:
            recomputed = partial(checkpoint, block.forward, use_reentrant=False)
            replaced.enter_context(forward_replaced(block, recomputed))
        yield
