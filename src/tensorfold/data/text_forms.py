"""The two forms of wikitext: raw, and non-raw with ``<unk>`` for rare words; under which names they go."""

from __future__ import annotations

from collections.abc import Sequence

_RAW, _NON_RAW = "raw", "non-raw"
# A data set of two forms -> the forms under their own names; wikitext-103 has the same validation and test texts.
FORMS = {name: {_RAW: f"{name}-raw-v1", _NON_RAW: f"{name}-v1"} for name in ("wikitext-2", "wikitext-103")}
_SAME_JUDGE = {"wikitext-2": "wikitext-103", "wikitext-103": "wikitext-2"}


def form_of(documents: Sequence[str]) -> str | None:
    """Form of a text of wikitext's kind: ``non-raw`` where rare words are ``<unk>``, ``raw`` where they are not.

    None for any other text; both forms write ``@-@`` for a hyphen inside a word.
    """
    if not any(" @-@ " in document for document in documents):
        return None
    return _NON_RAW if any("<unk>" in document for document in documents) else _RAW


def other_names(name: str, split: str) -> list[tuple[str, str | None]]:
    """Names under which the same text may lie, each with the form that its file must have, or None for any."""
    family = next((each for each, forms in FORMS.items() if name == each or name in forms.values()), None)
    if family is None:
        return []
    form = next((form for form, exact in FORMS[family].items() if exact == name), None)
    families = [family] if split == "train" else [family, _SAME_JUDGE[family]]
    forms = [_RAW, _NON_RAW] if form is None else [form]
    exact = [(FORMS[each][kind], None) for each in families for kind in forms]
    return [*exact, *((each, form) for each in families)]
