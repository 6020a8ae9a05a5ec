"""The cause of NaN and infinity in a model's numbers: damaged weights, or a dtype whose range is too small."""

from __future__ import annotations

import torch
from torch import nn


def why_not_finite(model: nn.Module) -> str:
    """Cause and remedy for NaN or infinity in a model's outputs, in words that end a sentence.

    The cause is a weight that holds them; where none does and there are float16 weights, overflow beyond 65,504.
    """
    parameters = [(name, each) for name, each in model.named_parameters() if not each.is_meta]
    floating = [(name, each) for name, each in parameters if each.is_floating_point()]
    damaged = next((name for name, each in floating if not bool(torch.isfinite(each).all())), None)
    if damaged is not None:
        return f"{damaged or 'its weight'} holds NaN or infinity: repair the checkpoint"
    if any(each.dtype is torch.float16 for _, each in floating):
        return (
            "all weights are finite, so float16, which ends at 65,504, has overflowed: load the model in a wider dtype "
            "(--dtype bfloat16 or float32; in Python model.to(torch.bfloat16))"
        )
    kinds = " and ".join(sorted({str(each.dtype).removeprefix("torch.") for _, each in floating}))
    return f"all weights are finite, in {kinds or 'no dtype'}: check the model's settings, and its checkpoint"
