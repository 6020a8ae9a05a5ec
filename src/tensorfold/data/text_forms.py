"""The two forms of the wikitext data sets, raw and non-raw, and the names that each goes by.

The non-raw form has ``<unk>`` in the place of rare words.
"""

from __future__ import annotations

from collections.abc import Sequence

_RAW, _NON_RAW = "raw", "non-raw"
# Data set -> form -> the name that means this form only.
FORMS = {name: {_RAW: f"{name}-raw-v1", _NON_RAW: f"{name}-v1"} for name in ("wikitext-2", "wikitext-103")}
# Data set -> the one with the same validation and test texts.
_SAME_JUDGE = {"wikitext-2": "wikitext-103", "wikitext-103": "wikitext-2"}


def form_of(documents: Sequence[str]) -> str | None:
    """The form of a wikitext: ``non-raw`` where ``<unk>`` occurs in it, ``raw`` where not; None for any other text.

    A text is taken for wikitext by its ``@-@``, which both forms write for a hyphen inside a word.
    """
    if not any(" @-@ " in document for document in documents):
        return None
    return _NON_RAW if any("<unk>" in document for document in documents) else _RAW


def other_names(name: str, split: str) -> list[tuple[str, str | None]]:
    """Other names of the same wikitext split, each with the form that a file of that name must have; None for any.

    Args:
        name: ``wikitext-2`` or ``wikitext-103``, or one of their forms' own names; other texts have no other names.
        split: ``train``, ``validation`` or ``test``.
    """
    family = next((each for each, forms in FORMS.items() if name == each or name in forms.values()), None)
    if family is None:
        return []
    form = next((form for form, exact in FORMS[family].items() if exact == name), None)
    families = [family] if split == "train" else [family, _SAME_JUDGE[family]]
    forms = [_RAW, _NON_RAW] if form is None else [form]
    exact = [(FORMS[each][kind], None) for each in families for kind in forms]
    return [*exact, *((each, form) for each in families)]
