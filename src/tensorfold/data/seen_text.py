"""Which text has had a say in a model, so that an evaluation on it can be told from one on held-out text.

A text is noted as a sketch: of the hashes of all its stretches of 12 tokens the 1,024 smallest (Broder's min-wise
sampling). Two texts can then be compared however they are cut into windows, and a note takes 11 kB whatever the text's
size.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tensorfold.errors import InputError, pass_on_memory
from tensorfold.utils.records import CARD, read_object

KEY = "seen_text"
CALIBRATION, TRAINING, SELECTION = "calibration", "training", "selection"
_WORDS = {
    CALIBRATION: "the fold was calibrated on",
    TRAINING: "healing was trained on",
    SELECTION: "the healed weights were selected by",
}

_STRETCH = 12  # tokens
_KEPT = 1024  # hashes
_LEAST = 0.01  # shares below are coincidence: phrases that any two texts have in common
_ATTRIBUTE = "tensorfold_seen_text"


@dataclass(frozen=True)
class Seen:
    """A text that has had a say in a model.

    Args:
        purpose: ``calibration``, ``training`` or ``selection`` (of a checkpoint).
        text: Its name.
        tokens: Its length.
        sketch: Little-endian 64-bit hashes in rising order, in base64.
    """

    purpose: str
    text: str
    tokens: int
    sketch: str

    @classmethod
    def of(cls, purpose: str, text: str, stretches: Iterable[np.ndarray]) -> Seen:
        """Note token ids, as arrays of consecutive tokens, shape (length,)."""
        tokens, kept = 0, np.empty(0, np.uint64)
        for ids in stretches:
            tokens += len(ids)
            hashes = _hashes(ids)
            if len(kept) == _KEPT:
                hashes = hashes[hashes < kept[-1]]
            kept = np.union1d(kept, hashes)[:_KEPT]
        return cls(purpose, text, tokens, base64.b64encode(kept.astype("<u8").tobytes()).decode())

    def share(self, hashes: np.ndarray) -> float:
        """The larger of two estimates: the share of another text that is in this one, and of this one in the other.

        Args:
            hashes: :func:`hashes_of` the other text.
        """
        ours = np.frombuffer(base64.b64decode(self.sketch), "<u8")
        # A sketch that is full says nothing of larger hashes.
        theirs = hashes[hashes <= ours[-1]] if len(ours) >= _KEPT else hashes
        common = len(np.intersect1d(ours, theirs, assume_unique=True))
        return max(common / max(1, len(theirs)), common / max(1, len(ours)))


def hashes_of(stretches: Iterable[np.ndarray]) -> np.ndarray:
    """Hashes of all 12 tokens in a row, each once, rising; of arrays of consecutive tokens, shape (length,)."""
    found = [_hashes(ids) for ids in stretches]
    return np.unique(np.concatenate(found)) if found else np.empty(0, np.uint64)


def overlaps(model: Any, windows: Iterable[np.ndarray]) -> list[dict[str, Any]]:
    """Texts noted with a model of which the windows hold, or are, a part: ``purpose``, ``text`` and ``share``."""
    known, found = noted(model), []
    hashes = hashes_of(windows if known else ())
    for seen in known:
        share = seen.share(hashes)
        if share >= _LEAST:
            found.append({"purpose": seen.purpose, "text": seen.text, "share": round(share, 3)})
    return found


def sentence(overlap: Mapping[str, Any]) -> str:
    """One of :func:`overlaps` in words."""
    words = _WORDS.get(overlap["purpose"], overlap["purpose"])
    return f"not held out: {overlap['share']:.0%} in common with the text that {words} ({overlap['text']})"


def note(model: Any, seen: Iterable[Seen]) -> None:
    """Note texts with a model in memory; saving it writes them to its card."""
    setattr(model, _ATTRIBUTE, [*getattr(model, _ATTRIBUTE, ()), *seen])


def noted(model: Any) -> list[Seen]:
    """Texts noted with a model, and in the card of the directory that it was loaded from; each once."""
    try:
        card = read_object(Path(getattr(model, "name_or_path", "") or "/nowhere") / CARD) or {}
    except (InputError, OSError, ValueError) as error:
        pass_on_memory(error)
        card = {}
    return list(dict.fromkeys([*_of_card(card), *getattr(model, _ATTRIBUTE, ())]))


def with_notes(card: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """A card together with the texts that are noted with the model; the card itself where there are none."""
    every = dict.fromkeys([*_of_card(card), *getattr(model, _ATTRIBUTE, ())])
    return {**card, KEY: [asdict(seen) for seen in every]} if every else dict(card)


def _of_card(card: Mapping[str, Any]) -> list[Seen]:
    """What a card notes, as far as it can be read: it may come from anyone."""
    entries, found = card.get(KEY), []
    for entry in entries if isinstance(entries, list) else ():
        try:
            seen = Seen(str(entry["purpose"]), str(entry["text"])[:200], int(entry["tokens"]), str(entry["sketch"]))
            if len(base64.b64decode(seen.sketch, validate=True)) % 8 or len(seen.sketch) > 2**16:
                continue
        except (KeyError, TypeError, ValueError, binascii.Error):
            continue
        found.append(seen)
    return found


def _hashes(ids: np.ndarray) -> np.ndarray:
    """A hash of every 12 tokens in a row."""
    count = len(ids) - _STRETCH + 1
    if count < 1:
        return np.empty(0, np.uint64)
    mixed = _mix(ids.astype(np.uint64))
    total = np.zeros(count, np.uint64)
    for place in range(_STRETCH):
        total = total * np.uint64(0x9E3779B97F4A7C15) + mixed[place : place + count]
    return _mix(total)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, which makes evenly distributed numbers of any."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
