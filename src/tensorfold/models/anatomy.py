"""Anatomy of a decoder-only transformer: its blocks, its foldable matrices, and the targets that name them.

No architecture is known by name. Blocks are the list of modules beside the table that text enters by; a linear layer
below something called attention is attention, any other linear layer in a block is MLP.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tensorfold.errors import InputError, pass_on_memory
from tensorfold.models.direct_reads import is_read_directly
from tensorfold.models.linear_maps import check_weights, orientation, other_weights
from tensorfold.models.tied_heads import tied_head
from tensorfold.nn import FoldedModule
from tensorfold.utils.validation import nearest

Targets = str | list[str] | Mapping[str, str]
Kind = Literal["linear", "embedding"]
GROUPS = ("mlp", "attention", "embedding", "positions", "all-linear")

ALREADY_FOLDED = "the model is already folded; start from the dense model, or heal and evaluate this one."

# Far more than any model has; a damaged configuration with millions would take hours to build even without weights.
_MOST_BLOCKS = 10_000

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_NOTHING = "targets: {!r} matches nothing in this model; {}{}"


@dataclass(frozen=True)
class Matrix:
    """One foldable weight.

    Attributes:
        name: Full name of its module.
        module: Module that holds it.
        out_features: Rows; the vocabulary of a table.
        in_features: Columns; the width of a table.
        kind: ``linear`` or ``embedding``.
        group: ``mlp``, ``attention``, ``embedding``, ``positions``, or ``""`` for none.
        tied_head: Name of the output head that shares a table's weight, if one does.
    """

    name: str
    module: nn.Module
    out_features: int
    in_features: int
    kind: Kind
    group: str
    tied_head: str | None = None

    @property
    def parameter(self) -> Tensor:
        """Weight as its module stores it."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> nn.Parameter | None:
        """Bias of the module, (out,), if it has one."""
        return getattr(self.module, "bias", None)


def dense_weight(module: nn.Module) -> Tensor:
    """Weight of a module as (out, in), a view: GPT-2's ``Conv1D``, which stores (in, out), is transposed here alone."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if orientation(module) == "in-out" else weight


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes ``x Wᵀ + b`` and nothing else."""
    return orientation(module) is not None


def _is_plain_embedding(module: nn.Module) -> bool:
    return type(module).forward is nn.Embedding.forward


def embedding_scale(module: nn.Module) -> float | None:
    """Constant that an embedding multiplies its rows with, 1.0 for a plain one; None if it does anything else."""
    if _is_plain_embedding(module):
        return 1.0
    scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", None))
    return float(scale) if isinstance(scale, int | float) else None


def check_not_quantised(config: PreTrainedConfig, what: str) -> None:
    """Check that a configuration is not that of weights which another library packed: GPTQ, AWQ, fp8, …

    It is checked before anything is loaded, since loading needs that library, and packed weights can be neither folded
    nor measured.

    Args:
        config: The model's.
        what: Name of the model, for messages.

    Raises:
        InputError: The weights are quantised.
    """
    for part in (config, config.get_text_config()):
        for key in ("quantization_config", "compression_config"):
            stored = getattr(part, key, None)
            if stored is None:
                continue
            settings = stored if isinstance(stored, dict) else getattr(stored, "__dict__", {})
            method = settings.get("quant_method") or "an unnamed method"
            method = getattr(method, "value", method)
            if method != "tensorfold":
                raise InputError(
                    f"{what}: its weights are quantised ({method}); needed floating-point weights: give the original "
                    "model that was quantised, or dequantise this one with transformers and save it."
                )


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the causal language model of a configuration on the meta device: shapes without weights.

    Raises:
        InputError: It is an encoder–decoder model, or no causal language model can be built from the configuration.
    """
    kind = type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{kind} is an encoder–decoder model; needed a decoder-only causal language model.")
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(count, int) and count > _MOST_BLOCKS:
        raise InputError(f"{kind}: num_hidden_layers={count}; needed at most {_MOST_BLOCKS}. Is config.json damaged?")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    # Every architecture fails in its own way, and all of them mean that the configuration is at fault.
    except Exception as error:
        pass_on_memory(error)
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise InputError(
            f"{kind}: no causal language model can be built from this configuration ({type(error).__name__}: "
            f"{reason}); needed the config.json of a decoder-only causal language model that transformers knows."
        ) from error
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0:
            raise InputError(
                f"{kind}: {name} has the shape {tuple(parameter.shape)}; needed positive sizes throughout."
            )
    return model


def context_length(config: Any) -> int | None:
    """Number of positions that a model has, by its configuration or its text part's; None where there is no limit.

    XLNet's −1 says that there is none.
    """
    if hasattr(config, "get_text_config"):  # a model of text and images nests the sizes
        config = config.get_text_config()
    named = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))  # the latter is MPT's
    return next((each for each in named if each is not None and each > 0), None)


def blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the transformer blocks that text goes through.

    Models of text and images, or of text and sound, have several such lists, and those of an encoder may be longer.
    Text enters by the input table: its blocks are the list that shares most of its path with the table; among equals
    the one with fewest steps from there, and then the longest.

    Raises:
        InputError: There is no list of modules with linear layers in them.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and _are_blocks(module)
            and not name.startswith(tuple(f"{n}." for n in found))
        ):
            found.append(name)
    if not found:
        raise InputError(
            f"{type(model).__name__} has no list of blocks with linear layers in them; needed a decoder-only "
            "transformer. Name its matrices yourself with targets: [suffixes] or {regex: ...}."
        )
    table = _path_of_table(model)

    def nearness(name: str) -> tuple[int, int, int]:
        path = name.split(".")
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(path, table, strict=False)))
        return shared, shared - len(path), len(model.get_submodule(name))  # type: ignore[arg-type]

    best = max(found, key=nearness)
    return best, model.get_submodule(best)  # type: ignore[return-value]


def _are_blocks(chain: nn.ModuleList) -> bool:
    """Whether a list of modules is one of blocks: all have modules inside, and a linear layer is somewhere below them.

    Hybrids alternate between classes of blocks, and not each of them has to have a plain linear layer.
    """
    if not all(any(True for _ in block.children()) for block in chain):
        return False
    below = (module for block in chain for module in block.modules() if module is not block)
    return any(is_plain_linear(module) or isinstance(module, FoldedModule) for module in below)


def _path_of_table(model: PreTrainedModel) -> list[str]:
    """Name of the input table, split at its dots; empty where there is no table."""
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # a model without one
        return []
    return next((name.split(".") for name, module in model.named_modules() if module is table), [])


def check_foldable(model: PreTrainedModel) -> None:
    """Check that a model can be folded.

    Raises:
        InputError: It is an encoder–decoder, quantised or folded already, or has an adapter or computed weights.
    """
    if not isinstance(model, PreTrainedModel):
        merge = " Merge the adapter first: model.merge_and_unload()." if hasattr(model, "merge_and_unload") else ""
        raise InputError(f"got {type(model).__name__}; needed a transformers model (PreTrainedModel).{merge}")
    check_no_adapter(model)
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{type(model).__name__} is an encoder–decoder model; needed a decoder-only causal language model."
        )
    if any(isinstance(module, FoldedModule) for module in model.modules()):
        raise InputError(ALREADY_FOLDED)
    if getattr(model, "hf_quantizer", None) is not None:
        method = getattr(getattr(config, "quantization_config", None), "quant_method", "unknown method")
        raise InputError(f"the model is quantised ({method}); needed floating-point weights: load it dequantised.")
    check_weights(model)


def check_no_adapter(model: PreTrainedModel) -> None:
    """Check that peft has not put an adapter into a model, whose matrices are then wrapped.

    Raises:
        InputError: It has.
    """
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise InputError(
                f"{name}: the model has an adapter in it (peft's {type(module).__name__}); needed the model alone: "
                "merge the adapter with peft (merge_and_unload), or take it out (model.delete_adapter)."
            )


def by_block(found: Mapping[str, Matrix], name: str) -> dict[int, dict[str, Matrix]]:
    """Group the matrices inside the blocks by the index of their block.

    Args:
        found: Matrices by name; those outside the blocks are left out.
        name: Name of the list of blocks.
    """
    inside: dict[int, dict[str, Matrix]] = {}
    for key, matrix in found.items():
        if key.startswith(f"{name}."):
            inside.setdefault(int(key.removeprefix(f"{name}.").partition(".")[0]), {})[key] = matrix
    return inside


def matrices(model: PreTrainedModel) -> dict[str, Matrix]:
    """Foldable weights of a model, by module name, in model order; a tied head belongs to its embedding.

    Layers whose weight other code reads past their forward are left out: see :mod:`tensorfold.models.direct_reads`.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    tied = tied_head(model) is not None
    try:
        in_block = blocks(model)[0] + "."
    except InputError:
        in_block = None
    positions = context_length(model.config)
    out = {}
    for name, module in model.named_modules():
        owners = [name, names[id(head)]] if tied and module is embedding else [name]
        if isinstance(getattr(module, "weight", None), Tensor) and any(is_read_directly(model, o) for o in owners):
            continue
        if module is embedding and isinstance(module, nn.Embedding):
            rows, columns = module.weight.shape
            out[name] = Matrix(name, module, rows, columns, "embedding", "embedding", names[id(head)] if tied else None)
        elif _is_plain_embedding(module) and module is not head:
            # Tables that shift the index or scale the row, such as OPT's positions, have a forward of their own.
            rows, columns = dense_weight(module).shape
            out[name] = Matrix(name, module, rows, columns, "embedding", "positions" if rows == positions else "")
        elif is_plain_linear(module) and not (tied and module is head):
            rows, columns = dense_weight(module).shape
            inside = in_block is not None and name.startswith(in_block)
            gate = rows == 1  # a single number a token, such as a shared expert's gate, is not worth factors
            group = "" if not inside or gate else "attention" if _ATTENTION.search(name) else "mlp"
            out[name] = Matrix(name, module, rows, columns, "linear", group)
    return out


def match(targets: Targets, available: Mapping[str, Matrix], model: PreTrainedModel | None = None) -> list[str]:
    """Select matrices by targets, in model order.

    Args:
        targets: ``mlp``, ``attention``, ``embedding``, ``positions`` (a learned table that is a plain ``nn.Embedding``
            with a row for each position), ``all-linear`` (every linear layer in the blocks, not the output head), a
            list of these and of name suffixes, or ``{"regex": pattern}`` searched in the full name.
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
    if item in GROUPS:
        return matrix.group == item
    return _names(item, matrix.name)


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
    return nearest(item, {*GROUPS, *(name.rpartition(".")[2] for name in available)})


def check_unshared(model: PreTrainedModel, chosen: Iterable[Matrix]) -> None:
    """Check that no chosen weight is shared with another module, other than a tied head.

    Raises:
        InputError: A weight can be reached under a second name.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for matrix in chosen:
        names = [name for name in owners[id(matrix.parameter)] if name != f"{matrix.tied_head}.weight"]
        if len(names) > 1:
            raise InputError(
                f"{matrix.name}: its weight is shared by {' and '.join(names)}; folding one would break or double the "
                "other. Exclude it, or give each its own copy first."
            )


def count_parameters(model: nn.Module) -> int:
    """Number of a model's parameters: a shared tensor counts once, a head that is tied by equal values not at all."""
    numbers = sum(parameter.numel() for parameter in model.parameters())
    if not isinstance(model, PreTrainedModel) or tied_head(model) is None:
        return numbers
    own, shared = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    return numbers if own is shared else numbers - own.numel()
