"""All kinds of specs, and which of them a stored one is."""

from __future__ import annotations

from typing import Any

from tensorfold.algebra.graded import GradedSpec
from tensorfold.algebra.spec import Spec
from tensorfold.algebra.token_mps import TokenMPSSpec

AnySpec = Spec | TokenMPSSpec | GradedSpec


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
