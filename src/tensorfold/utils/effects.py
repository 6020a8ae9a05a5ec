"""Settings without an effect are errors: what each setting needs, and the check that what was given has it.

A setting that does nothing hides a misunderstanding: whoever gave it takes the result for another than it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from tensorfold.errors import InputError


class Need(NamedTuple):
    """What must be so for a setting to do something.

    Attributes:
        what: Completes "… has no effect here; it needs …".
        is_met: Of all settings together.
    """

    what: str
    is_met: Callable[[Any], bool]


Needs = Mapping[str, tuple[Need, ...]]
ALWAYS: tuple[Need, ...] = ()  # the needs of a setting that does something whatever the others are


def has_effect(name: str, settings: Any, needs: Needs) -> bool:
    """Whether everything is so that the setting ``name`` needs."""
    return all(need.is_met(settings) for need in needs[name])


def check_effects(
    where: str, given: Iterable[str], settings: Any, needs: Needs, shown: Callable[[str], str] = str
) -> None:
    """Raise :class:`InputError` for the first of the settings ``given`` whose needs are not met.

    Args:
        where: What the message begins with.
        given: Names of the settings that somebody chose; each has an entry in ``needs``.
        settings: All of them, handed to :attr:`Need.is_met`.
        shown: How a name is written in the message.
    """
    for name in given:
        for need in needs[name]:
            if not need.is_met(settings):
                raise InputError(f"{where}: {shown(name)} has no effect here; it needs {need.what}.")


def changed(settings: Any) -> list[str]:
    """Names of a dataclass's fields that have another value than their default."""
    fields = dataclasses.fields(settings)
    return [
        field.name
        for field in fields
        if field.default is not dataclasses.MISSING and getattr(settings, field.name) != field.default
    ]
