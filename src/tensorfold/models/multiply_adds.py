"""Multiply–adds a token of a model's linear layers; of a layer's experts those of the few that a token is sent to.

A router sends a token to k of E experts. An expert's matrices count k / E times, as if all were sent equally many.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tensorfold.models.anatomy import is_plain_linear
from tensorfold.models.experts import fused_experts, is_expert, stacks

# What configurations call k, the one of DBRX in a part of its own.
_NAMES = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k", "moe_topk", "moe_k",
    "top_k_experts",
)  # fmt: skip
_IN_LIST = re.compile(r"((?:^|.*\.)experts?)\.\d+(?:\.|$)", re.IGNORECASE)


def experts_per_token(model: nn.Module) -> int | None:
    """How many experts of a layer a token is sent to; 0 where the configuration does not say, None without experts."""
    if not (fused_experts(model) or stacks(model) or any(is_expert(name) for name, _ in model.named_modules())):
        return None
    config: Any = model.config
    config = config.get_text_config()
    parts = [config, getattr(config, "ffn_config", None)]
    found = (getattr(part, name, None) for part in parts for name in _NAMES)
    return next((each for each in found if isinstance(each, int) and each > 0), 0)


def shares(model: nn.Module) -> Callable[[str], float]:
    """A function of the name of a matrix, or of a tensor of experts: the share of tokens that it multiplies, 0 … 1."""
    sent = experts_per_token(model)
    sizes = {name: each.experts for found in (fused_experts(model), stacks(model)) for name, each in found.items()}
    modules = dict(model.named_modules())

    def share(name: str) -> float:
        experts = sizes.get(name) or sizes.get(name.rpartition(".")[0])
        if experts is None and (listed := _IN_LIST.match(name)):
            experts = len(list(modules[listed[1]].children()))
        return 1.0 if experts is None or sent is None else min(1.0, sent / experts)

    return share


def dense_macs(model: nn.Module) -> int:
    """Multiply–adds a token of the plain linear layers, the head among them, and of experts in tensors."""
    share = shares(model)
    total = sum(share(name) * each.tensor.numel() for name, each in fused_experts(model).items())
    for name, module in model.named_modules():
        if is_plain_linear(module):
            assert isinstance(module.weight, Tensor)
            total += share(name) * module.weight.numel()
    return round(total)
