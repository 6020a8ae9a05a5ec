"""Base of all methods: frozen dataclasses that make a spec for a matrix's shape and a budget, and fill it.

A subclass of :class:`Method` with a ``name`` is known to recipes by that name.
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
    """Use of a method in a fold, which decides whether some of its settings have an effect.

    Attributes:
        method: The method.
        calibrated: Whether there is calibration text.
        linear: Whether a linear layer is among its targets.
        hidden: Whether an MLP's hidden layer is among its targets.
    """

    method: Any
    calibrated: bool
    linear: bool
    hidden: bool


TEXT = Need("calibration text", lambda use: use.calibrated)
LINEAR = Need("a linear layer among its targets", lambda use: use.linear)


@dataclass(frozen=True)
class Method(ABC):
    """Way of folding a matrix: how large its structure is, and how its cores are found.

    Fields of a subclass are its settings. By convention ``keep`` is the fraction of the dense parameters that stays;
    other fields give a shape outright.

    Attributes:
        name: Name in recipes.
        tables_only: Whether the method folds embeddings and no linear layers.
        joins_experts: Whether the method folds all experts of a tensor together, by ``spec_of_experts``.
        needs: By setting, what other settings must be for it to have an effect; settings without an entry always have.
        needs_of_use: By setting, what the use must be for it to have an effect.
    """

    name: ClassVar[str]
    tables_only: ClassVar[bool] = False
    joins_experts: ClassVar[bool] = False
    needs: ClassVar[Needs] = {}
    needs_of_use: ClassVar[Needs] = {}

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            METHODS[cls.name] = cls

    @abstractmethod
    def spec(self, out_features: int, in_features: int) -> Structure:
        """Spec for a matrix of a shape: never above ``keep``, and less than one step of a bond below it.

        Args:
            out_features: Rows of the matrix.
            in_features: Columns of the matrix.

        Raises:
            SpecError: No spec of this kind meets the settings; the message names the nearest that would.
        """

    def spec_of_experts(self, experts: int, out_features: int, in_features: int, width: int) -> Structure:
        """Spec for a tensor of experts, of methods that join them; ``width`` is that of the states between blocks."""
        raise NotImplementedError

    def concrete(self, group: str) -> Method:
        """Method that folds a matrix of a group: ``mlp``, ``attention``, ``embedding``, ``positions`` or ``""``."""
        return self

    @property
    def token_order(self) -> TokenOrder:
        """Order of rows before the fit; ``cluster`` and ``frequency`` are for tables, the latter needs text."""
        return "own"

    @property
    def fits_text(self) -> bool:
        """Whether :meth:`solve` looks at statistics where there are any."""
        return True

    @property
    def reads_states(self) -> bool:
        """Whether :meth:`solve` uses the vectors that a tied head reads, beside their second moment."""
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
        """Check that :meth:`solve` can fill a spec.

        Args:
            spec: A spec that this method made.
            calibrated: Whether there will be statistics.

        Raises:
            InputError: It could not; the message names the remedy.
        """
        if self.token_order == "frequency" and not calibrated:
            raise InputError(
                f"{self.name}: order: frequency counts the tokens of calibration text, and only for the embedding; "
                "give some, or use order: cluster, which needs none."
            )

    def solve(self, weight: Tensor, spec: OwnSpec, known: Statistics = NOTHING) -> Factors:
        """Find cores that approximate a weight, with the least ``‖G^½ (W − Ŵ) C^½‖`` unless the method says otherwise.

        Args:
            weight: W, shape (out, in).
            spec: A spec that this method made for the shape.
            known: Statistics of the matrix on calibration text, C and G among them; nothing by default.

        Raises:
            InputError: The method needs statistics and there are none, or the spec is not one of its own.
        """
        inputs, outputs = known.metrics()
        return factorize(weight, spec, inputs, known.start, outputs)


def check_settings(method: Method) -> None:
    """Check that no setting is switched off by another.

    Raises:
        InputError: A setting that was changed has no effect beside the others.
    """
    check_effects(method.name, [name for name in changed(method) if name in method.needs], method, method.needs)


def check_use(use: Use) -> None:
    """Check that every setting has an effect in a use of the method.

    Raises:
        InputError: A setting that was changed does nothing in this use.
    """
    needs = use.method.needs_of_use
    check_effects(use.method.name, [name for name in changed(use.method) if name in needs], use, needs)


def exactly_one(method: str, **given: object) -> None:
    """Check that exactly one of some settings is given.

    Args:
        method: Name of the method, for messages.
        given: Values by name of the setting; None is not given.

    Raises:
        InputError: None of them is given, or several.
    """
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise InputError(f"{method}: got {' and '.join(named) or 'nothing'}; needed exactly one of {', '.join(given)}.")


def largest_bond(method: str, keep: float, dense: int, step: int) -> int:
    """Largest bond dimension within a budget, where every step of the bond takes equally many parameters.

    Args:
        method: Name of the method, for messages.
        keep: Fraction of the dense parameters that stays.
        dense: Number of dense parameters.
        step: Parameters of one step of the bond.

    Raises:
        SpecError: Not even one step fits.
    """
    bond = math.floor(keep * dense / step)
    if bond < 1:
        raise SpecError(
            f"{method}: keep={keep} leaves {math.floor(keep * dense)} of {dense} parameters, but the smallest bond "
            f"already takes {step}; keep at least {math.ceil(step / dense * 1e4) / 1e4:.4f}, or exclude this module."
        )
    return bond
