"""Experts of a mixture that a model keeps in one tensor for all, as transformers 5 does: where, and which way round."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

from tensorfold.nn.experts import ExpertStack

_EXPERTS = re.compile(r"experts?", re.IGNORECASE)
_OF_OWN = re.compile(r"(^|\.)experts?\.\d+(\.|$)", re.IGNORECASE)


@dataclass(frozen=True)
class FusedExperts:
    """A tensor with the matrices of all experts of a layer.

    Attributes:
        name: Full name of the tensor.
        owner: Module that it belongs to.
        attribute: Its name there.
        turned: Whether it holds (E, in, out), not (E, out, in).
    """

    name: str
    owner: nn.Module
    attribute: str
    turned: bool

    @property
    def tensor(self) -> Tensor:
        """The tensor itself."""
        found = self.owner._parameters[self.attribute]
        assert found is not None
        return found

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Outputs and inputs of each expert."""
        first, second = self.tensor.shape[1:]
        return (second, first) if self.turned else (first, second)

    @property
    def experts(self) -> int:
        """Number of experts."""
        return len(self.tensor)

    def weight(self, expert: int) -> Tensor:
        """One expert's matrix (out, in), a view."""
        own = self.tensor.detach()[expert]
        return own.T if self.turned else own


def fused_experts(model: nn.Module) -> dict[str, FusedExperts]:
    """Tensors of experts in a model, by full name.

    They are parameters with three axes of modules that are called experts, by their class or their place.
    """
    found = {}
    for name, module in model.named_modules():
        if not _EXPERTS.search(type(module).__name__) and not _EXPERTS.search(name.rpartition(".")[2]):
            continue
        own = {key: p for key, p in module._parameters.items() if p is not None and p.dim() == 3 and min(p.shape) > 1}
        for key in own:
            full = f"{name}.{key}" if name else key
            found[full] = FusedExperts(full, module, key, _is_turned(module, own))
    return found


def _is_turned(module: nn.Module, own: dict[str, Tensor]) -> bool:
    """Whether tensors hold (E, in, out).

    transformers' experts say so. Of others, the width of the model is an axis of both tensors, and where gate and up
    are in one it is at the place of the inputs in one of them and of the outputs in the other. A wrong answer makes
    products slower, not wrong.
    """
    stated = getattr(module, "is_transposed", None)
    if isinstance(stated, bool):
        return stated
    apart = next((child.turned for child in module.children() if isinstance(child, ExpertStack)), None)
    if apart is not None:  # found while both tensors were there
        return apart
    shapes = [tuple(p.shape[1:]) for p in own.values()]
    if len(shapes) < 2:
        return False
    (a, b), (c, d) = shapes[0], shapes[-1]
    return b != c and a == d


def stacks(model: nn.Module) -> dict[str, ExpertStack]:
    """Experts of a model that have been taken apart, by the name of the tensor that they were in."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertStack)}


def is_expert(name: str) -> bool:
    """Whether a module's name says that it belongs to one expert of several, such as ``…experts.3.up_proj``."""
    return _OF_OWN.search(name) is not None
