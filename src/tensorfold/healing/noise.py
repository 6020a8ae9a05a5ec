"""The randomness of a model in training, such as dropout: found, set to one probability, and restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# Substrings of the names that transformers gives to probabilities of dropout (attention_dropout, attn_pdrop, drop_prob,
# …) and to the noise on a router's inputs. Of these the second line names what is switched off instead of set: no one
# value of router noise, or of the probability that a layer or branch is left out, suits every model.
_NAMES = ("drop", "jitter")
_NO_DROPOUT = ("layer", "path", "jitter")


class Noise:
    """All dropout of a model: its ``nn.Dropout`` modules, and the numbers in modules and configurations for functional
    dropout.

    Dropout of activations gets one probability everywhere. Dropout of layers and branches, and jitter of routers, are
    switched off.

    Args:
        model: The model to change, until :meth:`restore`.
        probability: Probability of dropout.
    """

    def __init__(self, model: PreTrainedModel, probability: float) -> None:
        self.probability = probability
        self._found = list(_places(model))
        self._before = [vars(place)[name] for place, name in self._found]
        self._set(probability)

    @property
    def of_configuration(self) -> tuple[float, float]:
        """The smallest and the largest probability of dropout above 0 that the model came with; 0 and 0 without any."""
        values = [
            value for (_, name), value in zip(self._found, self._before, strict=True) if _is_dropout(name) and value
        ]
        return (min(values), max(values)) if values else (0.0, 0.0)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Switch all randomness off while the context is open."""
        self._set(0.0)
        try:
            yield
        finally:
            self._set(self.probability)

    def restore(self) -> None:
        """Give the model back the probabilities that it came with."""
        for (place, name), value in zip(self._found, self._before, strict=True):
            vars(place)[name] = value

    def _set(self, probability: float) -> None:
        for place, name in self._found:
            # Through vars, past the checks of configurations: one declares its dropout an integer.
            vars(place)[name] = probability if _is_dropout(name) else 0.0


def _places(model: PreTrainedModel) -> Iterator[tuple[Any, str]]:
    """Every object and the name of its attribute that holds a probability, each pair once."""
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
    """Add a configuration, and those that it holds, by their identity."""
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
