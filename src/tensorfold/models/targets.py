"""Targets: the words and patterns of a recipe that name matrices of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping

from transformers import PreTrainedModel

from tensorfold.errors import InputError
from tensorfold.models.anatomy import Matrix
from tensorfold.models.experts import is_expert
from tensorfold.models.linear_maps import other_weights
from tensorfold.utils.validation import nearest

Targets = str | list[str] | Mapping[str, str]
GROUPS = ("mlp", "attention", "experts", "embedding", "positions", "all-linear")

_NOTHING = "targets: {!r} matches nothing in this model; {}{}"
_NUMBER = re.compile(r"\.\d+$")


def match(targets: Targets, available: Mapping[str, Matrix], model: PreTrainedModel | None = None) -> list[str]:
    """Select matrices by targets, in model order.

    Args:
        targets: ``mlp``, ``attention``, ``embedding``, ``positions`` (a learned table that is a plain ``nn.Embedding``
            with a row for each position), ``all-linear`` (every linear layer in the blocks, neither the output head nor
            experts that share a tensor), ``experts`` (these, and linear layers of experts that are modules of their
            own), a list of these and of name suffixes, or ``{"regex": pattern}`` searched in the full name.
        available: Foldable matrices by name.
        model: Model whose other weights a message names; None for none.

    Returns:
        Names of the matrices.

    Raises:
        InputError: Unknown group, bad pattern, or nothing matches.
    """
    if isinstance(targets, Mapping):
        if set(targets) != {"regex"} or not isinstance(targets["regex"], str):
            raise InputError(f'targets: got {dict(targets)!r}; needed {{regex: "pattern"}}.')
        try:
            pattern = re.compile(targets["regex"])
        except re.error as error:
            raise InputError(f"targets: {targets['regex']!r} is not a regular expression: {error}.") from None
        names = [name for name in available if pattern.search(name)]
        missed = next((head for head in _tied_heads(available) if pattern.search(head)), str(targets))
    else:
        items = [item.strip() for item in targets.split(",")] if isinstance(targets, str) else list(targets)
        chosen: set[str] = set()
        for item in items:
            hit = [name for name, matrix in available.items() if _selects(item, matrix)]
            if not hit:
                raise InputError(_NOTHING.format(item, _known(item, available), other_weights(model)))
            chosen.update(hit)
        names, missed = [name for name in available if name in chosen], str(targets)
    if not names:
        raise InputError(_NOTHING.format(targets, _known(missed, available), other_weights(model)))
    return names


def _selects(item: str, matrix: Matrix) -> bool:
    if item == "all-linear":
        return matrix.group in ("mlp", "attention")
    if item == "experts":
        return matrix.group == "experts" or (matrix.kind == "linear" and is_expert(matrix.name))
    if item in GROUPS:
        return matrix.group == item
    own = _NUMBER.sub("", matrix.name) if matrix.group == "experts" else matrix.name  # also all experts of a tensor
    return _names(item, matrix.name) or _names(item, own)


def _names(item: str, name: str) -> bool:
    return bool(item) and (name == item or name.endswith(f".{item}"))


def _tied_heads(available: Mapping[str, Matrix]) -> dict[str, str]:
    """Names of tables by the names of output heads that are tied to them."""
    return {matrix.tied_head: name for name, matrix in available.items() if matrix.tied_head is not None}


def _known(item: str, available: Mapping[str, Matrix]) -> str:
    if item == "positions":
        return (
            "needed a learned table of positions that is a plain nn.Embedding; one that shifts its index (OPT) is not."
        )
    for head, table in _tied_heads(available).items():
        if _names(item, head):
            return f"{head} is tied to {table}: target embedding, or untie them first with untie: true (--untie)."
    own = (_NUMBER.sub("", name) if each.group == "experts" else name for name, each in available.items())
    return nearest(item, {*GROUPS, *(name.rpartition(".")[2] for name in own)})
