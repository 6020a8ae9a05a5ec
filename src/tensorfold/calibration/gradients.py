"""Second moments of the loss's gradient at the outputs of layers, from one backward pass over a text.

Notation: m output features of a layer, G its gradient moment (m × m), g (m) the gradient at one output vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from tensorfold.utils.torch_modes import multiplies_bfloat16, rounded_products

_POSITIONS = 32  # whose predictions are in memory in fp32
_WINDOW = 256  # tokens in a backward pass, which holds their logits and the activations of one block


def gradient_moments(
    model: PreTrainedModel,
    windows: Tensor,
    modules: Mapping[str, nn.Module],
    prefix: int = 0,
    rounded: bool = False,
    drawn: bool = False,
) -> dict[str, Packed]:
    """The gradient moment ``G = Σ g gᵀ / tokens`` of every module: the Fisher matrix of its output.

    The loss is ``Σ −log p(next token)`` over the text, in nats. An output off by δ at one token then costs about
    ``½ δᵀ G δ`` nats. With next tokens drawn from the model's own predictions that is, to second order, the divergence
    from what it predicted. With those of the text it is the empirical Fisher matrix, which counts a token the more the
    worse it was predicted (Kunstner et al., arXiv 1905.12558).

    Args:
        model: A causal language model.
        windows: Token ids, shape (windows, length); their text is cut into pieces of 256 tokens.
        modules: Modules that return one tensor, shape (..., m), by name.
        prefix: How many tokens at the beginning of a window are what the tokenizer puts before a document. Every piece
            begins with them as context; neither they nor the first token of the text behind them are in the loss.
        rounded: Whether matrix products of a float32 model may take bfloat16 inputs where the processor has
            instructions for it, which more than halves the time. Sums stay in fp32, and what rounding adds is far below
            the spread between tokens.
        drawn: Whether next tokens are drawn from the model's predictions, see :func:`gradient_at`, in place of the
            text's.

    Returns:
        By name, symmetric, shape (m, m); without modules that are never called, such as an expert that no token is
        sent to.

    Raises:
        InputError: The gradients at a module hold NaN or infinity, or the model gives no logits for tokens.
        RuntimeError: The model's code does not bear products in bfloat16 (``rounded``).
    """
    sums: dict[str, Packed] = {}
    check_ids(model, windows, "calibration")
    pieces = pieces_of(model, windows, prefix)
    with gradients_watched(model, modules, sums, rounded), _recomputing(model):
        for piece in pieces:
            logits = next_token_logits(model, piece[None])
            logits.backward(gradient_at(logits, piece, prefix, drawn))
    averaged(sums, pieces, model)
    return sums


def pieces_of(model: PreTrainedModel, windows: Tensor, prefix: int) -> list[Tensor]:
    """The pieces of 256 tokens that one backward pass takes, each with the prefix of its window; shape (length,)."""
    return [
        begin(row[:prefix].tolist(), part)
        for parts in windows[:, prefix:].to(model.device).split(_WINDOW, dim=1)
        for row, part in zip(windows, parts, strict=True)
    ]


@contextmanager
def gradients_watched(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], sums: dict[str, Packed], rounded: bool
) -> Iterator[None]:
    """Add gradients at the outputs of modules to ``sums`` while the context is open, in which activations have them.

    Args:
        modules: Modules that return one tensor, shape (..., m), by name.
        sums: Grows by ``Σ g gᵀ`` of every module that a backward pass reaches.
        rounded: Whether matrix products may take bfloat16 inputs, see :func:`gradient_moments`.
    """

    def watch(name: str) -> Callable[..., Any]:
        def add(gradient: Tensor) -> None:
            flat = gradient.detach().reshape(-1, gradient.shape[-1]).float()  # (tokens, m)
            if name not in sums:
                sums[name] = Packed(flat.shape[-1], flat.device)
            sums[name].add(flat)

        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(add)

        return hook

    def root(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_().clone()  # no leaf: some models write into embeddings in place

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as hooks, torch.enable_grad():
        # Only activations get gradients; those of the weights would take as much memory as the model.
        for parameter in trained:
            parameter.requires_grad_(False)
        hooks.callback(lambda: [parameter.requires_grad_() for parameter in trained])
        hooks.callback(model.get_input_embeddings().register_forward_hook(root).remove)
        for name, module in modules.items():
            hooks.callback(module.register_forward_hook(watch(name)).remove)
        if rounded and model.device.type == "cpu" and model.dtype == torch.float32 and multiplies_bfloat16():
            hooks.enter_context(torch.autocast("cpu", torch.bfloat16))
        hooks.enter_context(rounded_products(rounded))
        yield


def averaged(sums: Mapping[str, Packed], pieces: Sequence[Tensor], model: PreTrainedModel) -> None:
    """Divide sums over the tokens of all pieces by their number, in place.

    Raises:
        InputError: A sum holds NaN or infinity; the message names its module.
    """
    for name, moment in sums.items():
        if not torch.isfinite(moment.values).all():
            raise InputError(f"{name}: the loss's gradients there hold NaN or infinity; {why_not_finite(model)}.")
        moment.divide(sum(len(piece) for piece in pieces))


def next_token_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """A causal language model's logits, shape (1, length, vocabulary), for token ids, shape (1, length).

    Raises:
        InputError: The model has no language model's head.
    """
    logits = getattr(model(ids, use_cache=False), "logits", None)
    table = model.get_input_embeddings()
    few = getattr(table, "num_embeddings", 0) // 2  # fewer are labels; Mllama's table has more rows than its head
    if not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape or logits.shape[-1] < few:
        shown = "no logits" if not isinstance(logits, Tensor) else f"logits of shape {tuple(logits.shape)}"
        raise InputError(
            f"{type(model).__name__} gives {shown} for {ids.shape[-1]} tokens, so text has no loss to divide a budget "
            "or fit a table by; needed a causal language model (AutoModelForCausalLM). Fold that one, take a method "
            "with a rank or keep of its own such as low-rank, or fold without calibration text."
        )
    return logits


@torch.no_grad()
def gradient_at(logits: Tensor, piece: Tensor, prefix: int, drawn: bool = False) -> Tensor:
    """The gradient ``softmax(logits) − one-hot(next token)`` of the loss, shape (1, length, vocabulary).

    Beside it a few positions are in memory in fp32. Predictions at the first ``prefix`` positions, and at the last,
    which has no next token, have gradient zero.

    Args:
        logits: Shape (1, length, vocabulary).
        piece: Token ids, shape (length,).
        prefix: How many tokens at its beginning the tokenizer puts before a document.
        drawn: Whether next tokens are drawn from the logits, on the CPU and with a seed that the piece decides, in
            place of the piece's own.
    """
    gradient = torch.zeros_like(logits)
    places = torch.arange(1, len(piece) + 1, device=piece.device)
    generator = torch.Generator().manual_seed(int((piece * places).sum()))
    for positions in torch.arange(prefix, len(piece) - 1, device=piece.device).split(_POSITIONS):
        part = logits[0, positions].float().softmax(-1)  # (positions, vocabulary)
        following = piece[positions + 1]
        if drawn and part.isfinite().all():  # elsewhere the gradient is not finite, which is told once it is summed
            following = torch.multinomial(part.cpu(), 1, generator=generator)[:, 0].to(piece.device)
        part[torch.arange(len(positions), device=piece.device), following] -= 1
        gradient[0, positions] = part.to(logits.dtype)
    return gradient


@contextmanager
def _recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Gradient checkpointing of every block while the context is open, whether or not the architecture offers it."""
    try:
        chain = list(blocks(model)[1])
    except InputError:
        chain = []
    with ExitStack() as replaced:
        for block in chain:
            recomputed = partial(checkpoint, block.forward, use_reentrant=False)
            replaced.enter_context(forward_replaced(block, recomputed))
        yield
