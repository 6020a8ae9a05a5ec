"""An embedding table in which frequent tokens have more numbers than rare ones, and the output head tied to it."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from tensorfold.algebra.precision import solvable
from tensorfold.algebra.solvers.graded import graded_low_rank
from tensorfold.algebra.specs.graded import GradedSpec
from tensorfold.algebra.specs.structure import Structure
from tensorfold.nn.structured import StructuredLinear, StructuredTable
from tensorfold.utils.validation import check_types


class GradedEmbedding(StructuredTable):
    """Token index → row of the table ``E`` (vocabulary, width), of graded low rank (see ``algebra.solvers.graded``).

    Args:
        spec: Vocabulary, width and classes. Only shapes are needed, so it can be built on the meta device.
        scale: Constant factor on every row, as Gemma applies it.

    Attributes:
        position: Place of each token in the order of the classes, int64, shape (vocabulary,). It is stored with the
            weights, because nothing else says which token a row is.
    """

    structure: ClassVar[type[Structure]] = GradedSpec
    position_buffer: ClassVar[str] = "position"

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        spec: GradedSpec,
        scale: float = 1.0,
        importance: Tensor | None = None,
        metric: Tensor | None = None,
    ) -> Self:
        """Fit a graded table and make the module.

        Args:
            weight: E, shape (vocabulary, width).
            spec: Vocabulary, width and classes.
            scale: Constant factor on every row.
            importance: w of the error ``Σ_t w_t ‖(e_t − ê_t) C^½‖²`` that is minimised, shape (vocabulary,), positive;
                it also sorts the tokens into classes. Equal if None.
            metric: C of that error, shape (width, width); the identity if None.

        Raises:
            SpecError: A shape does not fit ``spec``, or a value is not finite.
        """
        check_types(cls.__name__, weight=(weight, Tensor), spec=(spec, GradedSpec))
        return cls.from_factors(
            graded_low_rank(solvable(weight.detach()), spec, importance, metric), spec, weight, scale
        )


class GradedHead(StructuredLinear):
    """``y = h Eᵀ + b`` with E of graded low rank, never built: ``spec.macs`` multiply–adds a token, plus the bias.

    Args:
        spec: Shape of the embedding that the head is tied to.
        bias: Whether there is a bias of shape (vocabulary,).
    """

    structure: ClassVar[type[Structure]] = GradedSpec
    position_buffer: ClassVar[str] = "position"
    ways: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, spec: GradedSpec, bias: bool = False, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(spec, bias, device, dtype)
