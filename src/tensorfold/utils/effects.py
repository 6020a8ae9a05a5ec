"""The check that no setting is given that has no effect, as ``min_lr`` has none under a constant schedule.

A setting without effect hides a misunderstanding: whoever gave it believes that the result reflects it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from tensorfold.errors import InputError


class Need(NamedTuple):
    """A condition under which a setting has an effect.

    Attributes:
        what: The condition in words, as the end of "… has no effect here; it needs …".
        is_met: Whether the settings, taken together, meet it.
    """

    what: str
    is_met: Callable[[Any], bool]


Needs = Mapping[str, tuple[Need, ...]]
ALWAYS: tuple[Need, ...] = ()  # for a setting that has an effect whatever the others are


def has_effect(name: str, settings: Any, needs: Needs) -> bool:
    """Whether a setting has an effect: all its conditions are met.

    Args:
        name: The setting's name.
        settings: All settings.
        needs: Conditions of each setting, by name.
    """
    return all(need.is_met(settings) for need in needs[name])


def check_effects(
    where: str, given: Iterable[str], settings: Any, needs: Needs, shown: Callable[[str], str] = str
) -> None:
    """Raise :class:`InputError` for the first given setting that has no effect.

    Args:
        where: Beginning of the message.
        given: Names of the settings that somebody chose; each has an entry in ``needs``.
        settings: All settings, handed to :attr:`Need.is_met`.
        needs: Conditions of each setting, by name.
        shown: Maps a setting's name to the spelling in the message.
    """
    for name in given:
        for need in needs[name]:
            if not need.is_met(settings):
                raise InputError(f"{where}: {shown(name)} has no effect here; it needs {need.what}.")


def changed(settings: Any) -> list[str]:
    """Names of a dataclass's fields whose values differ from their defaults."""
    fields = dataclasses.fields(settings)
    return [
        field.name
        for field in fields
        if field.default is not dataclasses.MISSING and getattr(settings, field.name) != field.default
    ]
