"""The method that chooses structures and ranks by itself; ``--keep`` on the command line stands for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le

from tensorfold.algebra.specs.spec import Spec
from tensorfold.methods import Graded, LowRank
from tensorfold.methods.base import LINEAR, TEXT, Keep, Method, Positive, check_settings
from tensorfold.utils.effects import Need, Needs
from tensorfold.utils.validation import strict


@dataclass(frozen=True)
class Effort:
    """Work that a fold does on calibration text.

    Args:
        gradient_tokens: Tokens of the backward pass, which takes three to four times as long as a forward one; None for
            all tokens.
        staged: Whether the matrices of a block are folded in the order in which they are applied, each measured behind
            those before it, instead of all at once.
        feedback: Whether each matrix is fitted to the dense model's outputs, given the folded model's inputs.
        shrink: How far input moments are shrunk towards a multiple of the identity, 0 … 1. Chosen on text of another
            kind than that of the calibration: see ``studies/smollm2``.
        ridge: Pull towards the dense weight where a matrix is fitted with feedback, as a fraction of the mean input
            variance, beside ``error_feedback.RIDGE`` of each input's own. Chosen likewise.
        heads: Whether value heads of attention may become smaller, in the basis that keeps most; needs ``staged`` and
            ``feedback``. Not under a budget of bytes.
        units: Whether MLPs may lose hidden units, one by one, each time the one whose loss costs least with the others
            making up for it (``algebra.solvers.fewer_units``). Likewise.
        refine: Steps on the output of every block, once its matrices are folded; needs ``feedback``. 0 is none.
        shapes: Whether matrices may share one basis, with pivots, among groups of their columns, or of their rows if
            they have more of those, ``Σ_k A_k ⊗ b_kᵀ`` with A_k of shape (out, groups), where that is nearer. Only
            under a budget of parameters: groups take more multiply–adds than they have parameters.
    """

    gradient_tokens: int | None
    staged: bool
    feedback: bool
    shrink: float = 0.3
    ridge: float = 0.1
    heads: bool = False
    units: bool = False
    refine: int = 0
    shapes: bool = False


EFFORTS = {
    "low": Effort(2048, staged=False, feedback=False),
    "medium": Effort(None, staged=True, feedback=True, heads=True, units=True),
    "high": Effort(None, staged=True, feedback=True, heads=True, units=True, refine=48, shapes=True),
}


UNITS = Need(
    "effort: medium or high, and budget: parameters or multiply-adds",
    lambda auto: EFFORTS[auto.effort].feedback and auto.budget != "bytes",
)


@strict
class Auto(Method):
    """Best structure known for each matrix, with one budget for all linear layers of a rule.

    Linear layers become low rank with pivots (``LowRank(pivots=True)``), which no unpivoted low rank of that size
    comes near; embedding tables :class:`Graded`. With calibration text, ranks follow from what each matrix costs the
    model's loss, a matrix that would gain nothing stays dense, and all are fitted with weights from their inputs and
    the loss's gradients (``‖G^½ (W − Ŵ) C^½‖``); value heads of attention lose dimensions, in the basis in which they
    are needed least (``algebra.solvers.smaller_heads``), and MLPs hidden units, those that others can stand in for
    (``algebra.solvers.fewer_units``), where that costs less than rank. Without text, all have the same ``keep``.

    Args:
        keep: Fraction of the parameters of all matrices together that stays.
        effort: How much time calibration takes: ``low``, ``medium`` or ``high``.
        floor: Least that a linear layer keeps, as a fraction of an equal share.
        budget: Unit of ``keep`` where there is text: ``parameters``; ``multiply-adds``, of which these structures make
            one for every parameter, as the dense matrix does; or ``bytes``, which count the stored order of rows as
            well.
        plain: Whether the result stays a model that transformers alone can load: every MLP loses the same number of
            hidden units, the configuration says how many are left, and all other matrices stay dense. Needs text.
        multiple: What divides every rank that is chosen, and how many hidden units and numbers of all value heads are
            left, so that weights divide into the groups that engines store them in (32 for 4 bits). The rank of a
            matrix that stays dense is its own. Groups that share a basis are not tried then.
    """

    name: ClassVar[str] = "auto"
    needs: ClassVar[Needs] = {"plain": (UNITS,)}
    needs_of_use: ClassVar[Needs] = {
        **dict.fromkeys(("effort", "floor", "budget", "plain"), (TEXT, LINEAR)),
        "multiple": (LINEAR,),
    }

    keep: Keep
    effort: Literal["low", "medium", "high"] = "medium"
    floor: Annotated[float, Ge(0), Le(1)] = 0.5
    budget: Literal["parameters", "multiply-adds", "bytes"] = "parameters"
    plain: bool = False
    multiple: Positive = 1

    def __post_init__(self) -> None:
        check_settings(self)

    def concrete(self, group: str) -> Method:
        if group == "embedding":
            return Graded(keep=self.keep)
        return LowRank(keep=self.keep, pivots=group != "positions", multiple=self.multiple)

    def spec(self, out_features: int, in_features: int) -> Spec:
        """Spec of a linear layer (out, in) with an equal share of the budget."""
        return LowRank(keep=self.keep, pivots=True, multiple=self.multiple).spec(out_features, in_features)
