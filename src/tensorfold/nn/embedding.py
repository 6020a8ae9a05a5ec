"""An embedding table stored as a matrix product operator."""

from __future__ import annotations

from typing import ClassVar, Self

from torch import Tensor

from tensorfold.algebra.precision import solvable
from tensorfold.algebra.solvers.solve import factorize
from tensorfold.algebra.specs.spec import Spec
from tensorfold.algebra.specs.structure import Structure
from tensorfold.nn.structured import StructuredTable
from tensorfold.utils.validation import check_types


class MPOEmbedding(StructuredTable):
    """Token index → row of the table ``E`` (vocabulary, width), an MPO over (vocabulary, width).

    A lookup reads only the core slices of the tokens asked for. Kronecker tables (KnGPT2, arXiv 2110.08152), tensor
    trains (TT-Rec, arXiv 2101.11714) and low rank are all this module with different specs.

    Args:
        spec: ``out_features`` is the vocabulary, ``in_features`` the width.
        scale: Constant factor on every row, as Gemma applies it.
    """

    structure: ClassVar[type[Structure]] = Spec

    @classmethod
    def from_dense(cls, weight: Tensor, spec: Spec, scale: float = 1.0, metric: Tensor | None = None) -> Self:
        """Fit an MPO to a table and make the module.

        Args:
            weight: Table, shape (vocabulary, width).
            spec: Modes and bonds.
            scale: Constant factor on every row.
            metric: C of the error ``‖(E − Ê) C^½‖`` that is minimised, shape (width, width); the identity if None.

        Raises:
            SpecError: A shape does not fit ``spec``, or a value is not finite.
        """
        check_types(cls.__name__, weight=(weight, Tensor), spec=(spec, Spec))
        return cls.from_factors(factorize(solvable(weight.detach()), spec, metric), spec, weight, scale)
