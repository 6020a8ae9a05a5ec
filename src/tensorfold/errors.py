"""The exceptions this package raises on purpose.

Every message says what was got, what was needed and what to do about it. The command line turns
:class:`InputError` into exit status 2 and any other :class:`TensorfoldError` into exit status 1.
"""


class TensorfoldError(Exception):
    """Something went wrong while working; the input was acceptable (exit status 1)."""


class InputError(TensorfoldError, ValueError):
    """The caller's input cannot be used: a bad option, recipe, model, text or checkpoint (exit status 2)."""


class SpecError(InputError):
    """A shape, bond or budget that no matrix product operator can have."""
