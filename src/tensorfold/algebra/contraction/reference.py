"""Reference products that the fast ones must equal, each one einsum that anyone can check; slow, for tests alone."""

from __future__ import annotations

import string
from collections.abc import Sequence

import torch
from torch import Tensor

from tensorfold.algebra.contraction.paths import Chain, Step


def equation(sites: int) -> str:
    """Einsum equation of the matrix that a number of cores stand for.

    Small letters are bonds, the first and the last of size 1; of site k, capital letters 2k and 2k + 1 are the output
    and the input mode.

    >>> equation(2)
    'aABb,bCDc->ACBD'
    """
    small, large = string.ascii_lowercase, string.ascii_uppercase
    out_modes, in_modes = large[0 : 2 * sites : 2], large[1 : 2 * sites : 2]
    cores = [f"{small[k]}{out_modes[k]}{in_modes[k]}{small[k + 1]}" for k in range(sites)]
    return f"{','.join(cores)}->{out_modes}{in_modes}"


def to_dense(cores: Sequence[Tensor], spec: Chain) -> Tensor:
    """Matrix W of a chain of cores, shape (out_features, in_features), padding cut off."""
    matrix = torch.einsum(equation(spec.sites), *cores)  # (m_1 … m_L, n_1 … n_L)
    rows = matrix.shape[: spec.sites].numel()
    return matrix.reshape(rows, -1)[: spec.out_features, : spec.in_features]


def multiply(state: Tensor, core: Tensor, step: Step) -> Tensor:
    """State after one step, by its einsum equation: state (t, l, c, r), less axes that the form lacks; core (d, c)."""
    axes = {"t": -1, "l": step.left, "c": step.c, "r": step.right}
    operand = step.form.split(",")[0]
    return torch.einsum(step.form, state.reshape([axes[axis] for axis in operand]), core)
