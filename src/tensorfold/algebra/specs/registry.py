"""Structures from their stored descriptions, and a bound on how large a structure may be."""

from __future__ import annotations

from typing import Any

from tensorfold.algebra.specs.expert_train import ExpertTrain  # noqa: F401  (known by its kind)
from tensorfold.algebra.specs.graded import GradedSpec
from tensorfold.algebra.specs.spec import Spec
from tensorfold.algebra.specs.structure import STRUCTURES, Structure
from tensorfold.algebra.specs.token_mps import TokenMPSSpec
from tensorfold.errors import SpecError

_LARGEST = 16  # numbers that a structure may have for each of the dense matrix
_SMALL = 2**20  # numbers that are never too many, whatever the dense matrix has
# The first three structures are stored without their kind; each has a key that the others lack.
_BY_KEY: dict[str, type[Structure]] = {"modes": TokenMPSSpec, "classes": GradedSpec}


def check_size(spec: Structure) -> None:
    """Check that modes and bonds are not far larger than the matrix, before anything of their size is made.

    Raises:
        SpecError: Cores or padded matrix would hold more than 16 times the dense matrix's numbers plus 2^20.
    """
    dense = spec.dense_parameters
    for what, numbers in (("modes make", spec.padded_parameters), ("cores hold", spec.parameters)):
        if numbers > _LARGEST * dense + _SMALL:
            raise SpecError(
                f"{type(spec).__name__}: its {what} {numbers:,} numbers for a matrix of {dense:,}; needed at most "
                f"{_LARGEST} times as many. Give smaller modes or ranks."
            )


def spec_from_dict(data: dict[str, Any]) -> Structure:
    """Build a structure from the JSON form that its ``to_dict`` gave.

    Raises:
        SpecError: The kind is not known, or the values do not fit together.
    """
    if not isinstance(data, dict):
        return Spec.from_dict(data)
    if "kind" in data:
        kind = data["kind"]
        if not isinstance(kind, str) or kind not in STRUCTURES:
            raise SpecError(
                f"structure {kind!r} is not known; import the module that defines it before loading. Known: "
                f"{', '.join(sorted(STRUCTURES))}."
            )
        return STRUCTURES[kind].from_dict(data)
    return next((own for key, own in _BY_KEY.items() if key in data), Spec).from_dict(data)
