"""All kinds of specs, and which of them a stored one is."""

from __future__ import annotations

import math
from typing import Any

from tensorfold.algebra.solvers.graded import GradedSpec
from tensorfold.algebra.solvers.token_mps import TokenMPSSpec
from tensorfold.algebra.specs.spec import Spec
from tensorfold.errors import SpecError

AnySpec = Spec | TokenMPSSpec | GradedSpec
_LARGEST = 16  # times the dense matrix
_SMALL = 2**20  # numbers that are never too many


def check_size(spec: AnySpec) -> None:
    """Raise :class:`SpecError` for modes or bonds far larger than the matrix, before anything of their size is made."""
    dense = spec.out_features * spec.in_features
    padded = 0
    if isinstance(spec, TokenMPSSpec):
        padded = spec.vocabulary * spec.padded_width
    elif isinstance(spec, Spec):
        padded = math.prod((*spec.out_modes, *spec.in_modes))
    for what, numbers in (("modes make", padded), ("cores hold", spec.parameters)):
        if numbers > _LARGEST * dense + _SMALL:
            raise SpecError(
                f"{type(spec).__name__}: its {what} {numbers:,} numbers for a matrix of {dense:,}; needed at most "
                f"{_LARGEST} times as many. Give smaller modes or ranks."
            )


def spec_from_dict(data: dict[str, Any]) -> AnySpec:
    """The spec whose ``to_dict`` gave ``data``.

    Raises:
        SpecError: It is no kind's, or its values do not fit together.
    """
    if isinstance(data, dict) and "modes" in data:
        return TokenMPSSpec.from_dict(data)
    if isinstance(data, dict) and "classes" in data:
        return GradedSpec.from_dict(data)
    return Spec.from_dict(data)
