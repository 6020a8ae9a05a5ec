"""Timing of several ways to do one piece of work, with ratios that hold on a machine that does other things too.

One sample of each way is taken in turn, and ratios are of samples of one round: whatever slows a round down slows all
of them. Medians and quartiles over the rounds are reported.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

Clock = Callable[[], float]

# A sample of a short call is a loop of about this many seconds, of at most _MOST_REPEATS calls, so that reading the
# clock does not matter.
_SAMPLE = 5e-3
_MOST_REPEATS = 500

_SHORTEST = 1e-12


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a few samples.

    Attributes:
        median: Half of the samples are below it.
        q1: A quarter of the samples is below it.
        q3: Three quarters of the samples are below it.
    """

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Compute median and quartiles of at least one value; quartiles interpolate between the samples."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3)

    def to_dict(self) -> dict[str, float]:
        """JSON form."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.q1:.2f}–{self.q3:.2f})"


def in_turn(names: Iterable[str], rounds: int) -> Iterator[str]:
    """Names in the order of sampling: each once a round, every round beginning one further than the last."""
    order = list(names)
    for number in range(rounds):
        first = number % len(order)
        yield from order[first:] + order[:first]


def interleave(
    calls: Mapping[str, Callable[[], object]], rounds: int, clock: Clock, finish: Callable[[], None]
) -> dict[str, list[float]]:
    """Time several calls in turn, after each has run twice.

    Args:
        calls: Calls by name.
        rounds: Samples of each.
        clock: Seconds since any moment.
        finish: Waits until an accelerator has done all that it was given.

    Returns:
        Seconds a call, one sample a round, by name.
    """
    repeats = {}
    for name, call in calls.items():
        call()  # allocators, and plans that libraries make once
        took = _sample(call, 1, clock, finish)
        repeats[name] = max(1, min(_MOST_REPEATS, round(_SAMPLE / took)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for name in in_turn(calls, rounds):
        samples[name].append(_sample(calls[name], repeats[name], clock, finish))
    return samples


def _sample(call: Callable[[], object], repeats: int, clock: Clock, finish: Callable[[], None]) -> float:
    """Seconds a call, as the mean over a loop of repeats."""
    finish()
    start = clock()
    for _ in range(repeats):
        call()
    finish()
    return max((clock() - start) / repeats, _SHORTEST)


def waiting_for(device: torch.device) -> Callable[[], None]:
    """Function that waits until a device has done all that it was given; on a CPU it does nothing."""
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)


@dataclass(frozen=True)
class Timing:
    """Times of one piece of work, done by the model and by all that it is compared with.

    Args:
        tokens: Number of tokens of the work.
        samples: Seconds by name, one sample a round; ``"model"`` is the model benchmarked, other names are its rivals.
        macs: Multiply–adds a token by name, where they are known.
    """

    tokens: int
    samples: Mapping[str, Sequence[float]]
    macs: Mapping[str, float]

    @property
    def speedup(self) -> dict[str, Spread]:
        """Seconds of each rival over those of the model in the same round: above 1 the model is faster."""
        own = self.samples["model"]
        return {
            name: Spread.of([other / mine for other, mine in zip(values, own, strict=True)])
            for name, values in self.samples.items()
            if name != "model"
        }

    @property
    def tokens_per_second(self) -> dict[str, float]:
        """Tokens a second in the median sample, by name."""
        return {name: self.tokens / Spread.of(values).median for name, values in self.samples.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "tokens": self.tokens,
            "seconds": {name: Spread.of(values).to_dict() for name, values in self.samples.items()},
            "tokens_per_second": self.tokens_per_second,
            "speedup": {name: spread.to_dict() for name, spread in self.speedup.items()},
            "macs": dict(self.macs),
        }
