"""New tokens in the vocabulary of a model whose embedding is folded."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tensorfold.errors import InputError
from tensorfold.models.anatomy import is_plain_linear
from tensorfold.nn import FoldedModule, StructuredTable
from tensorfold.utils.validation import check_types


@torch.no_grad()
def append_tokens(model: PreTrainedModel, vectors: Tensor, head_vectors: Tensor | None = None) -> None:
    """Add tokens to a model whose input embedding is a ``TokenMPSEmbedding``, in place, without any training.

    The new rows are decomposed by themselves; all others stay as they are, bit for bit. A tied head shares the rows; an
    untied dense one gets ``head_vectors``. New entries of a head's bias are its mean. The configuration follows, so
    that the model can be saved. Grow the tokenizer yourself, and make optimizers anew.

    Args:
        model: Folded model.
        vectors: Rows of the new tokens, shape (new tokens, width), as the dense table would hold them (before the scale
            of a scaled one).
        head_vectors: Rows for an untied head, shape (new tokens, width); the mean of its rows by default.

    Raises:
        InputError: The embedding, or the head of an untied model, cannot grow, or a shape does not fit. Nothing is
            changed then.
    """
    check_types("append_tokens", model=(model, PreTrainedModel), vectors=(vectors, Tensor))
    check_types("append_tokens", head_vectors=(head_vectors, Tensor | None))
    table, head = _growing(model), model.get_output_embeddings()
    tied = isinstance(head, FoldedModule) and head.cores is table.cores
    if not (tied or head is None or (isinstance(head, nn.Linear) and is_plain_linear(head))):
        raise InputError(
            f"append_tokens: the output head is a {type(head).__name__} that is not tied to the embedding, and its "
            "rows share factors; leave it dense, or call resize_token_embeddings of the dense model and fold it again."
        )
    if head_vectors is not None and (tied or head_vectors.shape != vectors.shape):
        raise InputError(
            f"append_tokens: got head_vectors of shape {tuple(head_vectors.shape)}; needed "
            + ("none, because the head is tied." if tied else f"{tuple(vectors.shape)}, as vectors.")
        )
    table.append(vectors)
    if isinstance(head, nn.Linear):
        new = head.weight.mean(0).expand(len(vectors), -1) if head_vectors is None else head_vectors
        head.weight = _grown(head.weight, new)
        head.out_features = head.weight.shape[0]
    if (tied or isinstance(head, nn.Linear)) and head.bias is not None:
        head.bias = _grown(head.bias, head.bias.mean().expand(len(vectors)))
    _describe(model, table)


def _growing(model: PreTrainedModel) -> StructuredTable:
    """Input embedding of a model, if tokens can be added to it.

    Raises:
        InputError: They cannot.
    """
    table = model.get_input_embeddings()
    if not (isinstance(table, StructuredTable) and table.grows):
        dense = isinstance(table, nn.Embedding)
        which = f"output head is a {type(model.get_output_embeddings()).__name__}" if dense else (
            f"input embedding is a {type(table).__name__}"
        )  # fmt: skip
        raise InputError(
            f"new tokens: the {which}; needed a TokenMPSEmbedding, whose tokens share nothing, or table and head "
            "dense. Call resize_token_embeddings of the dense model, and fold it again."
        )
    return table


def _grown(parameter: Tensor, new: Tensor) -> nn.Parameter:
    """Parameter with new rows behind its own."""
    return nn.Parameter(torch.cat([parameter, new.to(parameter)]), parameter.requires_grad)


def _describe(model: PreTrainedModel, table: StructuredTable) -> None:
    """Write the size and structure of a table that has grown into the model's configuration."""
    model.config.get_text_config().vocab_size = table.num_embeddings
    model.vocab_size = table.num_embeddings  # type: ignore[assignment]
    name = next(name for name, module in model.named_modules() if module is table)
    model.config.quantization_config.modules[name] = table.spec.to_dict()


@torch.no_grad()
def resize_token_embeddings(
    model: PreTrainedModel,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    mean_resizing: bool = True,
) -> nn.Module:
    """Resize the vocabulary of a folded model: transformers' method of this name.

    A dense table with a dense head, or none, is resized by transformers itself. To a folded table whose tokens share
    nothing, new tokens are added as the mean of all rows; to start them as anything else, call :func:`append_tokens`.

    Args:
        model: Folded model.
        new_num_tokens: Number of tokens after the call; None for as many as there are.
        pad_to_multiple_of: Number that the number of tokens is rounded up to a multiple of; None for no rounding.
        mean_resizing: Whether new rows start at the mean; it has to be true for a folded table.

    Returns:
        The input embedding.

    Raises:
        InputError: There would be fewer tokens than before, or table or head cannot grow (see :func:`append_tokens`).
            The model is then as it was.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(table, nn.Embedding) and (head is None or isinstance(head, nn.Linear)):
        own = type(model).resize_token_embeddings
        return own(model, new_num_tokens, pad_to_multiple_of, mean_resizing)
    before = table.num_embeddings
    after = before if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of is not None:
        after = -(-after // pad_to_multiple_of) * pad_to_multiple_of
    if after < before or not mean_resizing:
        raise InputError(
            f"resize_token_embeddings: got {after} tokens and mean_resizing={mean_resizing} for a folded table of "
            f"{before}; needed at least as many, and mean_resizing=True. tensorfold.append_tokens takes other vectors."
        )
    if after > before:
        mean = _growing(model).to_dense(torch.float32).mean(0)
        append_tokens(model, mean.expand(after - before, -1))
    return table
