"""Modules that compute ``x Wᵀ + b``, found by running them; and weights that cannot be folded, with the reason.

A class says little: Falcon's linear layers are a subclass of ``nn.Linear`` with a forward of their own that computes
``x Wᵀ + b`` too, and routers are subclasses that do not. A module of unknown class is therefore tried on numbers: its
forward runs on a small stand-in of it, so that neither its size nor its device matters, and no hook of it is called.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tensorfold.errors import InputError, pass_on_memory
from tensorfold.models.direct_reads import is_read_directly
from tensorfold.nn import FoldedModule

Orientation = Literal["out-in", "in-out"]

_IN, _OUT = 5, 3  # features of the stand-in
_SIZES = {"in_features": _IN, "out_features": _OUT, "nx": _IN, "nf": _OUT}
_STACKED = "matrices of several experts in one tensor, which only targets: experts, or their names, mean"
_KNOWN: dict[tuple[Any, ...], Orientation | None] = {}  # results of trials so far, by class and settings


def orientation(module: nn.Module) -> Orientation | None:
    """Order of axes in which a module that computes ``x Wᵀ + b`` stores W; None if it computes anything else."""
    kind, forward = type(module), type(module).forward
    if not _has_own_forward(module):
        if isinstance(module, nn.Linear) and forward is nn.Linear.forward:
            return "out-in"
        if isinstance(module, Conv1D) and forward is Conv1D.forward:
            return "in-out"
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or isinstance(module, nn.Embedding | FoldedModule):
        return None
    if (
        _has_own_forward(module)
        or module._modules
        or module._buffers
        or not {*module._parameters} <= {"weight", "bias"}
    ):
        return None
    bias = getattr(module, "bias", None)
    settings = tuple(
        (name, value)
        for name, value in sorted(module.__dict__.items())
        if isinstance(value, bool | int | float | str | None) and name not in (*_SIZES, "training")
    )
    key = (kind, forward, bias is None, settings)
    if key not in _KNOWN:
        tried = (way for way in ("out-in", "in-out") if _computes(module, way, bias is not None))  # type: ignore[arg-type]
        _KNOWN[key] = next(tried, None)  # type: ignore[arg-type]
    return _KNOWN[key]


def _has_own_forward(module: nn.Module) -> bool:
    """Whether a module was given a forward other than its class's; accelerate's wrapper keeps the class's beside it."""
    own = module.__dict__.get("_old_forward", module.__dict__.get("forward"))
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def _computes(module: nn.Module, stored: Orientation, has_bias: bool) -> bool:
    """Whether a small stand-in of a module, with its weight stored in this order of axes, computes ``x Wᵀ + b``."""
    with ExitStack() as modes:
        modes.enter_context(torch.no_grad())
        modes.enter_context(torch.device("cpu"))  # plans are made under the meta device
        modes.enter_context(torch.autocast("cpu", enabled=False))
        modes.enter_context(torch.random.fork_rng(devices=[]))
        generator = torch.Generator(device="cpu").manual_seed(0)
        weight = torch.randn(_OUT, _IN, dtype=torch.float64, generator=generator)
        bias = torch.randn(_OUT, dtype=torch.float64, generator=generator) if has_bias else None
        kept = nn.Parameter(weight if stored == "out-in" else weight.T.contiguous(), False)
        parameters = {"weight": kept, "bias": None if bias is None else nn.Parameter(bias, False)}
        for training, size in itertools.product((False, True), (1.0, 50.0)):
            stand_in = copy.copy(module)
            sizes = {name: value for name, value in _SIZES.items() if name in module.__dict__}
            stand_in.__dict__.update({**sizes, "_parameters": parameters, "training": training})
            x = size * torch.randn(2, 4, _IN, dtype=torch.float64, generator=generator)
            try:
                y = type(module).forward(stand_in, x)
            except Exception as error:  # a forward that needs other inputs fails in its own way, and is none of ours
                pass_on_memory(error)
                return False
            expected = F.linear(x, weight, bias)
            if not isinstance(y, Tensor) or y.shape != expected.shape or not torch.allclose(y, expected, rtol=1e-9):
                return False
    return True


def other_weights(model: PreTrainedModel | None) -> str:
    """Sentence that names the matrices of a model that cannot be folded, with the reason; empty if there are none."""
    found: dict[str, str] = {}
    for name, module in model.named_modules() if model is not None else ():
        said = _why_not(model, name, module)
        if said is not None:
            found.setdefault(said, name)
    experts_first = sorted(found.items(), key=lambda entry: not entry[0].endswith(_STACKED))
    shown = [f"{name}: {said}" for said, name in experts_first]
    rest = f", and {len(shown) - 4} more kinds" if len(shown) > 4 else ""
    return f" No targets are {'; '.join(shown[:4])}{rest}." if shown else ""


def _why_not(model: PreTrainedModel, name: str, module: nn.Module) -> str | None:
    """Reason why a module's matrices cannot be folded, in words; None where it has none, or they can."""
    known = (nn.Embedding, FoldedModule, nn.modules.conv._ConvNd)
    own = {key: p for key, p in module.named_parameters(recurse=False) if p.dim() > 1}
    if not own or isinstance(module, known) or name == "":
        return None
    kind = type(module).__name__
    stacked = {key: p for key, p in own.items() if p.dim() == 3 and min(p.shape) > 1}
    if stacked:
        shapes = " and ".join(f"{key} {tuple(p.shape)}" for key, p in stacked.items())
        return f"{shapes} of {kind}, {_STACKED}"
    if "weight" in own and is_read_directly(model, name):
        return f"its weight ({kind}) is read by other code past its forward"
    if "weight" in own and orientation(module) is None:
        return f"the forward of {kind} is not x Wᵀ + b"
    if "weight" not in own:
        return f"{' and '.join(own)} of {kind}, parameters of no linear layer"
    return None


def check_weights(model: nn.Module) -> None:
    """Check that no weight is computed before every forward: by masks, weight norm or hooks.

    A computed weight is no parameter of its layer, so it cannot be replaced, saved or counted.

    Raises:
        InputError: A weight is; the message says how to make it a parameter.
    """
    for name, module in model.named_modules():
        if not isinstance(getattr(module, "weight", None), Tensor) or isinstance(module, FoldedModule):
            continue
        if isinstance(module, nn.Embedding) or orientation(module) is not None or _is_computed(module):
            for why, remedy in _troubles(module):
                raise InputError(f"{name}: {why}; needed a weight that is a parameter: {remedy}")


def _is_computed(module: nn.Module) -> bool:
    """Whether the weight of a plain linear layer is no parameter."""
    return isinstance(module, nn.Linear | Conv1D) and "weight" not in module._parameters


def _troubles(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Reasons why a module's weight is computed before every forward, each with its remedy, in words."""
    if parametrize.is_parametrized(module):
        for tensor, chain in module.parametrizations.items():  # type: ignore[operator, union-attr]
            kinds = ", ".join(type(step).__name__ for step in chain)
            yield (
                f"its {tensor} is parametrized ({kinds})",
                f'torch.nn.utils.parametrize.remove_parametrizations(module, "{tensor}") makes it one.',
            )
    for hook in module._forward_pre_hooks.values():
        tensor = getattr(hook, "_tensor_name", getattr(hook, "name", "weight"))
        if isinstance(hook, prune.BasePruningMethod):
            yield (
                f"its {tensor} is a product with a pruning mask",
                f'torch.nn.utils.prune.remove(module, "{tensor}") makes it one.',
            )
        elif isinstance(hook, WeightNorm | SpectralNorm):
            kind = "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
            yield (
                f"its {tensor} is computed by {kind} before every forward",
                f'torch.nn.utils.remove_{kind}(module, "{tensor}") makes it one.',
            )
    if "weight" not in module._parameters:
        yield (
            "its weight is computed from other tensors",
            "take out what computes it, and set module.weight = nn.Parameter(module.weight.detach()).",
        )
    hooked = module._forward_pre_hooks or module._forward_hooks
    if hooked and not isinstance(module, nn.Embedding) and not module.weight.is_meta and _hooks_change(module):  # type: ignore[union-attr]
        yield (
            "a hook changes its weight, inputs or outputs, and would be lost",
            "take the hook out with the handle's remove(), once the weight is what it is to be.",
        )


@torch.no_grad()
def _hooks_change(module: nn.Module) -> bool:
    """Whether a linear layer's hooks make it compute anything but ``x Wᵀ + b``."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    before = weight.detach().clone()
    dense = before.T if orientation(module) == "in-out" else before
    generator = torch.Generator(device="cpu").manual_seed(0)
    x = torch.randn(2, dense.shape[1], generator=generator, device="cpu").to(before)
    try:
        y = module(x)
    except Exception as error:  # whatever the hook needs, it is not given here
        pass_on_memory(error)
        return True
    expected = F.linear(x, dense, getattr(module, "bias", None))
    now = module.weight
    assert isinstance(now, Tensor)
    near = 100 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    same = isinstance(y, Tensor) and y.shape == expected.shape and bool((y - expected).abs().max() <= near)
    return not same or not torch.equal(now, before)
