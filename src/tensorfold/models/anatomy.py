"""Anatomy of a decoder-only transformer: its blocks and its foldable matrices.

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
from tensorfold.models.experts import fused_experts, stacks
from tensorfold.models.linear_maps import check_weights, orientation
from tensorfold.models.tied_heads import tied_head
from tensorfold.nn import FoldedModule
from tensorfold.nn.experts import ExpertLinears, ExpertStack

Kind = Literal["linear", "embedding"]
ALREADY_FOLDED = "the model is already folded; start from the dense model, or heal and evaluate this one."

# Far more than any model has; a damaged configuration with millions would take hours to build even without weights.
_MOST_BLOCKS = 10_000

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


@dataclass(frozen=True)
class Matrix:
    """One foldable weight.

    Attributes:
        name: Full name of its module.
        module: Module that holds it.
        out_features: Rows; the vocabulary of a table.
        in_features: Columns; the width of a table.
        kind: ``linear`` or ``embedding``.
        group: ``mlp``, ``attention``, ``embedding``, ``positions``, ``experts`` for one that was or is in one tensor
            with others, or ``""`` for none.
        tied_head: Name of the output head that shares a table's weight, if one does.
        experts: Number of experts of which the matrix holds all, one below the other; 0 for one of its own. Its module
            is then the experts taken apart, or a stand-in with the tensor itself.
        fused: Name of the tensor with all experts of a layer that the weight is a view of; the module is then a
            stand-in beside the model. None for a weight of its own.
    """

    name: str
    module: nn.Module
    out_features: int
    in_features: int
    kind: Kind
    group: str
    tied_head: str | None = None
    fused: str | None = None
    experts: int = 0

    @property
    def parameter(self) -> Tensor:
        """Weight as its module stores it; of several experts a tensor of their shapes with the first one's numbers."""
        if isinstance(self.module, ExpertLinears):
            first: Tensor = self.parts[0].parameter
            return first.expand(self.experts, *first.shape)
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def parts(self) -> list[Matrix]:
        """The matrix itself, or those of the experts that it holds."""
        if not isinstance(self.module, ExpertLinears):
            return [self]
        shape = self.module.matrix_shape
        children = self.module.named_children()
        return [Matrix(f"{self.name}.{key}", child, *shape, "linear", "experts") for key, child in children]

    @property
    def bias(self) -> nn.Parameter | None:
        """Bias of the module, (out,), if it has one."""
        return getattr(self.module, "bias", None)


def dense_weight(module: nn.Module) -> Tensor:
    """Weight of a module as (out, in), a view: GPT-2's ``Conv1D``, which stores (in, out), is transposed here alone."""
    if isinstance(module, ExpertStack):
        return module.matrices().flatten(0, 1)
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


def width(model: PreTrainedModel) -> int:
    """Number of features of the states between blocks, by the configuration or the input table; 0 where unknown."""
    stated = getattr(model.config.get_text_config(), "hidden_size", None)
    return stated if isinstance(stated, int) else 0


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


def _beside_blocks(model: PreTrainedModel) -> list[str]:
    """Names of the list of blocks and of lists that hold parts of the same blocks beside it, such as XLM's MLPs."""
    try:
        name, chain = blocks(model)
    except InputError:
        return []
    owner = name.rpartition(".")[0]
    beside = model.get_submodule(owner).named_children()
    same = [key for key, each in beside if isinstance(each, nn.ModuleList) and len(each) == len(chain)]
    lists = [f"{owner}.{key}" if owner else key for key in same]
    return [each for each in lists if each == name or _are_blocks(model.get_submodule(each))]  # type: ignore[arg-type]


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
    in_block = tuple(f"{name}." for name in _beside_blocks(model))
    positions = context_length(model.config)
    apart = stacks(model)
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
            inside = name.startswith(in_block)
            gate = rows == 1  # a single number a token, such as a shared expert's gate, is not worth factors
            group = "" if not inside or gate else "attention" if _ATTENTION.search(name) else "mlp"
            group = "experts" if name.rpartition(".")[0] in apart else group
            out[name] = Matrix(name, module, rows, columns, "linear", group)
    return {**out, **_fused(model)}


def _fused(model: PreTrainedModel) -> dict[str, Matrix]:
    """Matrices of experts that share a tensor, by the names that they have once they are taken apart."""
    out = {}
    for name, fused in fused_experts(model).items():
        rows, columns = fused.matrix_shape
        for expert in range(fused.experts):
            stand_in = nn.Linear(columns, rows, bias=False, device="meta")
            stand_in.weight = nn.Parameter(fused.weight(expert), fused.tensor.requires_grad)
            own = f"{name}.{expert}"
            out[own] = Matrix(own, stand_in, rows, columns, "linear", "experts", fused=name)
    return out


def expert_tensors(model: PreTrainedModel) -> dict[str, Matrix]:
    """All experts of a tensor as one matrix (E·m, n), by the name of the tensor; folded ones are left out."""
    out = {}
    for name, fused in fused_experts(model).items():
        stand_in = nn.Module()
        stand_in.weight = fused.tensor
        rows, columns = fused.matrix_shape
        out[name] = Matrix(name, stand_in, fused.experts * rows, columns, "linear", "experts", experts=fused.experts)
    for name, stack in stacks(model).items():
        if isinstance(stack, ExpertLinears) and not any(isinstance(each, FoldedModule) for each in stack.children()):
            rows, columns = stack.matrix_shape
            out[name] = Matrix(name, stack, stack.experts * rows, columns, "linear", "experts", experts=stack.experts)
    return out


def check_unshared(model: PreTrainedModel, chosen: Iterable[Matrix]) -> None:
    """Check that no chosen weight is shared with another module, other than a tied head.

    Raises:
        InputError: A weight can be reached under a second name.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for matrix in chosen:
        weight = matrix.parameter if matrix.fused is None else model.get_parameter(matrix.fused)
        names = [name for name in owners[id(weight)] if name != f"{matrix.tied_head}.weight"]
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
