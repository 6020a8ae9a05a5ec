"""Frozen dataclasses whose fields are checked by pydantic and whose errors are :class:`InputError`."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable
from typing import Any, TypeVar, dataclass_transform, get_args

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from tensorfold.errors import InputError, SpecError

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def strict(cls: type[T]) -> type[T]:
    """Decorate a class as a frozen dataclass that checks its fields.

    Values have to be of the annotated types, and numbers finite. An unknown field is an error that names the nearest
    known one. Every error that making an object raises is an :class:`InputError`.
    """
    checked: Any = dataclass(
        frozen=True, config=ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)
    )(cls)
    construct = checked.__init__

    @functools.wraps(construct, updated=())
    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            construct(self, *args, **kwargs)
        except ValidationError as error:
            label = getattr(cls, "name", cls.__name__)
            fields = [field.name for field in dataclasses.fields(checked)]
            raise InputError("; ".join(_explain(label, e, fields) for e in error.errors())) from None

    checked.__init__ = initialise
    return checked


def nearest(name: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """A hint for an error: ``did you mean 'x'?`` with the nearest known name.

    Args:
        name: The unknown name.
        known: All names that are known.
        otherwise: The hint where no known name is near; a list of all of them by default.
    """
    known = sorted(set(known) - {name})
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known are {', '.join(known)}." if otherwise is None else otherwise


def check_keys(where: str, mapping: Any, known: Iterable[str]) -> None:
    """Raise :class:`InputError` unless a value is a mapping whose keys are all known.

    Args:
        where: Beginning of the message.
        mapping: The value to check.
        known: Names that may be keys.
    """
    known = list(known)
    if not isinstance(mapping, dict):
        raise InputError(f"{where}: got {mapping!r}; needed a mapping with some of the keys {', '.join(known)}.")
    for key in mapping:
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}; {nearest(str(key), known)}")


def check_types(where: str, **given: tuple[object, Any]) -> None:
    """Raise :class:`InputError` for an argument of a wrong type: ``check_types("load", path=(path, str | Path))``.

    A bool does not count as a number.

    Args:
        where: Beginning of the message.
        given: By name, the value and its type or union of types.
    """
    for name, (value, kind) in given.items():
        kinds = get_args(kind) or (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            words = " or ".join("None" if each is type(None) else each.__name__ for each in kinds)
            raise InputError(f"{where}: got {name}={value!r:.100}; needed {words}.")


def check_floating(**given: Any) -> None:
    """Raise :class:`SpecError` for a tensor that is not of a floating-point dtype, or lies on the meta device.

    Args:
        given: Tensors by the name that the message has for them: ``check_floating(weight=weight)``.
    """
    for name, tensor in given.items():
        if not tensor.is_floating_point() or tensor.is_meta:
            where = " on the meta device" if tensor.is_meta else ""
            raise SpecError(
                f"{name} of {tensor.dtype}{where}; needed floating-point numbers: convert it first, to the dtype that "
                "the factors shall have."
            )


def _explain(label: str, error: Any, fields: list[str]) -> str:
    """One of pydantic's errors as a message that says what was given and what is needed."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "unexpected_keyword_argument":
        return f"{label}: unknown key {where!r}; {nearest(where, fields)}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    needed = error["msg"].removeprefix("Input should be ")
    return f"{label}: got {where}={error['input']!r}; needed {needed[0].lower()}{needed[1:]}."
