"""Confidence intervals of perplexities, from the spread between windows.

Notation: window w has negative log-likelihood L_w over T_w scored tokens, u_w = T_w / ΣT is its weight (1 / windows
where a protocol averages means of windows), and μ = Σ u_w L_w / T_w the mean that the perplexity is the exponential of.

Tokens of one window depend on each other, so a window is what is drawn anew (Miller, arXiv 2411.00640, on clustered
errors): the variance of μ is ``n / (n − 1) · Σ u_w² (L_w / T_w − μ)²`` for n windows. Two models judged on the same
windows are compared by their differences in each, whose spread is far smaller than that of either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from tensorfold.errors import InputError
from tensorfold.evaluation.result import Evaluation, WindowScore

LEVEL = 0.95
_LEAST = 4  # windows; the spread of fewer says nothing


@dataclass(frozen=True)
class Comparison:
    """Perplexity of one model over that of another, on the same windows.

    Attributes:
        ratio: Of the perplexities.
        interval: Its 95 % confidence interval; None with fewer than four windows.
        windows: How many both were judged on.
    """

    ratio: float
    interval: tuple[float, float] | None
    windows: int

    def __str__(self) -> str:
        return f"× {self.ratio:.4f}{shown(self.interval, 4)} over {self.windows:,} windows, paired"


def perplexity_interval(scores: Sequence[WindowScore], mean: float) -> tuple[float, float] | None:
    """The 95 % confidence interval of a perplexity.

    Args:
        scores: One a window.
        mean: μ, in nats.

    Returns:
        Its ends, or None with fewer than four windows.
    """
    return _interval([(score.weight, score.nll / score.tokens) for score in scores], mean)


def compare(one: Evaluation, other: Evaluation) -> Comparison:
    """The ratio of two perplexities, by windows that both models were judged on.

    Raises:
        InputError: Protocol, text or tokens of the two differ, or tokenizers cut the text differently.
    """
    if one.protocol != other.protocol or not one.scores or not other.scores:
        raise InputError(
            f"compare: got evaluations by {one.protocol} and {other.protocol}; needed two by one protocol on a text."
        )
    if [(a.tokens, a.weight) for a in one.scores] != [(b.tokens, b.weight) for b in other.scores]:
        raise InputError(
            f"compare: got {len(one.scores)} windows of {one.tokens:,} tokens and {len(other.scores)} of "
            f"{other.tokens:,}; needed the same windows: the same text, and tokenizers that cut it alike."
        )
    pairs = zip(one.scores, other.scores, strict=True)
    differences = [(a.weight, (a.nll - b.nll) / a.tokens) for a, b in pairs]
    mean = sum(weight * difference for weight, difference in differences)
    return Comparison(math.exp(mean), _interval(differences, mean), len(differences))


def shown(interval: tuple[float, float] | None, digits: int = 2) -> str:
    """An interval for people, with a space before it; nothing for none."""
    return "" if interval is None else f" [{interval[0]:,.{digits}f}, {interval[1]:,.{digits}f}]"


def _interval(weighted: Sequence[tuple[float, float]], mean: float) -> tuple[float, float] | None:
    """Ends of exp(μ ± t · standard error), for pairs of weight and value."""
    count = len(weighted)
    if count < _LEAST:
        return None
    variance = count / (count - 1) * sum((weight * (value - mean)) ** 2 for weight, value in weighted)
    half = student_quantile(count - 1) * math.sqrt(variance)
    return math.exp(mean - half), math.exp(min(mean + half, 700.0))


def student_quantile(freedom: int, level: float = LEVEL) -> float:
    """The number of standard errors that a two-sided interval reaches to, by Student's distribution.

    The expansion of Abramowitz and Stegun, 26.7.5, in the normal quantile; off by less than 0.5 % from three degrees of
    freedom on.

    Args:
        freedom: Degrees of freedom, ν; 3 or more.
        level: Probability of the interval.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(float(term / freedom**power) for power, term in enumerate(terms, start=1))
