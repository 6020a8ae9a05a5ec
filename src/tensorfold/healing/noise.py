"""What a model draws at random while it trains: found, set to one probability, and given back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# Substrings of the names that transformers gives to probabilities (attention_dropout, attn_pdrop, drop_prob, …) and to
# noise on what a router reads. For noise, and for leaving out layers or branches, no one value suits every model.
_NAMES = ("drop", "jitter")
_NO_DROPOUT = ("layer", "path", "jitter")


class Noise:
    """Dropout of a model: nn.Dropout modules, and the numbers that modules and configuration hold for functional ones.

    Dropout of activations gets one probability everywhere. Dropout of layers and branches, and jitter of routers, are
    off.

    Args:
        probability: Of dropout, from now until :meth:`restore`.
    """

    def __init__(self, model: PreTrainedModel, probability: float) -> None:
        self.probability = probability
        self._found = list(_places(model))
        self._before = [vars(place)[name] for place, name in self._found]
        self._set(probability)

    @property
    def of_configuration(self) -> tuple[float, float]:
        """Smallest and largest probability of dropout that the model came with."""
        values = [
            value for (_, name), value in zip(self._found, self._before, strict=True) if _is_dropout(name) and value
        ]
        return (min(values), max(values)) if values else (0.0, 0.0)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within it nothing is drawn at random."""
        self._set(0.0)
        try:
            yield
        finally:
            self._set(self.probability)

    def restore(self) -> None:
        """Give the model back what it came with."""
        for (place, name), value in zip(self._found, self._before, strict=True):
            vars(place)[name] = value

    def _set(self, probability: float) -> None:
        for place, name in self._found:
            # Past the checks of configurations, of which one has a dropout that is declared an integer.
            vars(place)[name] = probability if _is_dropout(name) else 0.0


def _places(model: PreTrainedModel) -> Iterator[tuple[Any, str]]:
    """Each object and attribute that holds a probability, once."""
    configurations: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            yield module, "p"
        yield from ((module, name) for name, value in vars(module).items() if _is_probability(name, value))
        _collect(getattr(module, "config", None), configurations)
    for configuration in configurations.values():
        yield from (
            (configuration, name) for name, value in vars(configuration).items() if _is_probability(name, value)
        )


def _collect(value: Any, into: dict[int, PreTrainedConfig]) -> None:
    if isinstance(value, PreTrainedConfig) and id(value) not in into:
        into[id(value)] = value
        for inner in vars(value).values():
            _collect(inner, into)


def _is_probability(name: str, value: Any) -> bool:
    return (
        any(part in name for part in _NAMES)
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and 0 <= value <= 1
    )


def _is_dropout(name: str) -> bool:
    return not any(part in name for part in _NO_DROPOUT)
