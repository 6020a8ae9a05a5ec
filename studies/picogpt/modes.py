"""How PicoGPT's 25 matrices become MPOs: the paper's modes, and two or three sites for every one of them.

``recipe(16, "paper")`` is the shipped recipe ``picogpt-mpo-16``. The paper gives two sites to the square matrices and
the head, three to the MLP's; here the other number can be chosen for each, so that two and three sites can be compared
at equal χ (``recipe(16, 2)``) and at equal parameters (``recipe(bond_for(177_408, 2), 2)``).
"""

from __future__ import annotations

from typing import Any, Literal

from tensorfold.algebra.specs.bonds import attainable_ranks
from tensorfold.algebra.specs.spec import Spec
from tensorfold.errors import InputError

Sites = Literal["paper", 2, 3]
Modes = tuple[tuple[int, ...], tuple[int, ...]]  # out, in

# Modes ascend and are as even as powers of two allow. 65 = 5·13 has no third factor: the middle site of the head has
# one output, and takes a part of the inputs; padding to three even modes would store 72 rows for 65 characters.
MODES: dict[str, dict[int, Modes]] = {
    "attention": {2: ((8, 16), (8, 16)), 3: ((4, 4, 8), (4, 4, 8))},
    "up_proj": {2: ((16, 32), (8, 16)), 3: ((8, 8, 8), (4, 4, 8))},
    "down_proj": {2: ((8, 16), (16, 32)), 3: ((4, 4, 8), (8, 8, 8))},
    "lm_head": {2: ((5, 13), (8, 16)), 3: ((5, 1, 13), (4, 8, 4))},
}
PAPER = {"attention": 2, "up_proj": 3, "down_proj": 3, "lm_head": 2}
MATRICES = {"attention": 16, "up_proj": 4, "down_proj": 4, "lm_head": 1}
DENSE = 13_696  # what is never folded: token rows, norms, biases


def modes(target: str, sites: Sites) -> Modes:
    """(out_modes, in_modes) of the matrices that ``target`` names.

    Raises:
        InputError: Another number of sites.
    """
    if sites not in ("paper", 2, 3):
        raise InputError(f'modes: got sites={sites!r}; needed "paper", 2 or 3.')
    return MODES[target][PAPER[target] if sites == "paper" else sites]


def bond(target: str, chi: int, sites: Sites) -> int:
    """χ, or the largest bond that the matrix can have: with that it is exact already."""
    return min(chi, max(attainable_ranks(*modes(target, sites))))


def recipe(chi: int, sites: Sites = "paper", init: Literal["random"] | None = None) -> dict[str, Any]:
    """The recipe, as the mapping its YAML would hold, that folds all 25 linear layers of a PicoGPT.

    ``init=None`` is TT-SVD, refined where the fold has calibration text.

    Raises:
        InputError: χ is less than 1, or another number of sites.
    """
    if chi < 1:
        raise InputError(f"recipe: got chi={chi}; needed at least 1.")
    rules = []
    for target in MODES:
        out_modes, in_modes = modes(target, sites)
        rules.append({
            "targets": [target],
            "method": "mpo",
            "out_modes": list(out_modes),
            "in_modes": list(in_modes),
            "bond": bond(target, chi, sites),
            **({"init": init} if init else {}),
        })  # fmt: skip
    return {"fold": rules}


def parameters(chi: int, sites: Sites) -> int:
    """Of the whole model with that recipe."""
    specs = {target: Spec.from_modes(*modes(target, sites), bond(target, chi, sites)) for target in MODES}
    return DENSE + sum(MATRICES[target] * spec.parameters for target, spec in specs.items())


def bond_for(parameters_at_most: int, sites: Sites) -> int:
    """The largest χ whose model has at most so many parameters.

    Raises:
        InputError: Not even χ = 1 does.
    """
    if parameters(1, sites) > parameters_at_most:
        raise InputError(
            f"bond_for: got {parameters_at_most:,} parameters; needed at least {parameters(1, sites):,}, which χ = 1 "
            f"has with sites={sites!r}."
        )
    largest = max(max(attainable_ranks(*modes(target, sites))) for target in MODES)
    return max(chi for chi in range(1, largest + 1) if parameters(chi, sites) <= parameters_at_most)
