"""What every method is: a frozen dataclass that makes a spec of a shape and a budget, and fills it.

A subclass of :class:`Method` with a ``name`` is thereby known to recipes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from tensorfold.algebra.orders.token_order import TokenOrder
from tensorfold.algebra.solvers.solve import Factors, factorize
from tensorfold.algebra.specs.structure import Structure
from tensorfold.algebra.statistics import Statistics
from tensorfold.errors import InputError, SpecError
from tensorfold.utils.effects import Need, Needs, changed, check_effects

METHODS: dict[str, type[Method]] = {}

Keep = Annotated[float, Gt(0), Lt(1)]
Positive = Annotated[int, Ge(1)]
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]
OwnSpec = Any  # the kind of spec that the method itself makes
NOTHING = Statistics()


@dataclass(frozen=True)
class Use:
    """What a method is used for in a fold: whether with text, on linear layers, on hidden units of an MLP."""

    method: Any
    calibrated: bool
    linear: bool
    hidden: bool


TEXT = Need("calibration text", lambda use: use.calibrated)
LINEAR = Need("a linear layer among its targets", lambda use: use.linear)


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods. ``keep`` is the fraction of the dense parameters that stays; explicit shapes go without."""

    name: ClassVar[str]
    tables_only: ClassVar[bool] = False  # whether it folds embeddings and no linear layers
    needs: ClassVar[Needs] = {}  # what a setting needs of the others to have an effect; always, if not named
    needs_of_use: ClassVar[Needs] = {}  # what some need of the Use

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            METHODS[cls.name] = cls

    @abstractmethod
    def spec(self, out_features: int, in_features: int) -> Structure:
        """The spec for a matrix of this shape; never above ``keep``, and less than one bond step below it.

        Raises:
            SpecError: The shape cannot be met; the message names the nearest that can.
        """

    def concrete(self, group: str) -> Method:
        """The method that folds a matrix of this group (``mlp``, ``attention``, ``embedding``, ``positions`` or "")."""
        return self

    @property
    def token_order(self) -> TokenOrder:
        """How the rows are sorted before the fit; anything but ``own`` is for tables only, and ``frequency`` counts."""
        return "own"

    @property
    def fits_text(self) -> bool:
        """Whether :meth:`solve` looks at statistics where there are any."""
        return True

    @property
    def reads_states(self) -> bool:
        """Whether it asks for the very vectors that a tied head reads, beside their second moment."""
        return False

    @property
    def reorders_hidden(self) -> bool:
        """Whether folding a layer reorders the hidden units of its MLP, and so touches that layer's neighbours."""
        return False

    @property
    def rowwise(self) -> bool:
        """Whether every row is fitted by itself, so that parts of a table give the cores of the whole."""
        return False

    def check(self, spec: OwnSpec, calibrated: bool) -> None:
        """Raise :class:`InputError` if :meth:`solve` could not fill this spec, with statistics where ``calibrated``."""
        if self.token_order == "frequency" and not calibrated:
            raise InputError(
                f"{self.name}: order: frequency counts the tokens of calibration text, and only for the embedding; "
                "give some, or use order: cluster, which needs none."
            )

    def solve(self, weight: Tensor, spec: OwnSpec, known: Statistics = NOTHING) -> Factors:
        """Fill ``spec`` for ``weight`` (out, in), in the metrics of what is known of the matrix from text.

        Raises:
            InputError: The method needs statistics and there are none, or the spec is not one of its own.
        """
        inputs, outputs = known.metrics()
        return factorize(weight, spec, inputs, known.start, outputs)


def check_settings(method: Method) -> None:
    """Raise :class:`InputError` for a setting that another one switches off."""
    check_effects(method.name, [name for name in changed(method) if name in method.needs], method, method.needs)


def check_use(use: Use) -> None:
    """Raise :class:`InputError` for a setting that does nothing in this use."""
    needs = use.method.needs_of_use
    check_effects(use.method.name, [name for name in changed(use.method) if name in needs], use, needs)


def exactly_one(method: str, **given: object) -> None:
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise InputError(f"{method}: got {' and '.join(named) or 'nothing'}; needed exactly one of {', '.join(given)}.")


def largest_bond(method: str, keep: float, dense: int, step: int) -> int:
    """How many bond steps of ``step`` parameters fit in ``keep`` of ``dense`` ones.

    Raises:
        SpecError: Not even one fits.
    """
    bond = math.floor(keep * dense / step)
    if bond < 1:
        raise SpecError(
            f"{method}: keep={keep} leaves {math.floor(keep * dense)} of {dense} parameters, but the smallest bond "
            f"already takes {step}; keep at least {math.ceil(step / dense * 1e4) / 1e4:.4f}, or exclude this module."
        )
    return bond
