"""Records of the texts that shaped a model, so that an evaluation on one of them can be told from held-out text.

A text is recorded as a sketch: the 1,024 smallest hashes of all its runs of 12 consecutive tokens (min-wise sampling:
Broder, "On the resemblance and containment of documents", 1997). Sketches can be compared however the texts are cut
into windows, and take 11 kB whatever the text's size.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tensorfold.utils.records import read_card

KEY = "seen_text"
CALIBRATION, TRAINING, SELECTION = "calibration", "training", "selection"
_WORDS = {
    CALIBRATION: "the fold was calibrated on",
    TRAINING: "healing was trained on",
    SELECTION: "the healed weights were selected by",
}

_STRETCH = 12  # tokens in a run that is hashed
_KEPT = 1024  # hashes in a sketch
_LEAST = 0.01  # smaller shares are coincidence: phrases that any two texts have in common
_ATTRIBUTE = "tensorfold_seen_text"


@dataclass(frozen=True)
class Seen:
    """The record of one text that shaped a model.

    Args:
        purpose: What the text was used for: ``calibration``, ``training``, or ``selection`` of a checkpoint.
        text: The text's name.
        tokens: The text's length in tokens.
        sketch: The smallest hashes in rising order, little-endian 64-bit, in base64.
    """

    purpose: str
    text: str
    tokens: int
    sketch: str

    @classmethod
    def of(cls, purpose: str, text: str, stretches: Iterable[np.ndarray]) -> Seen:
        """The record of a text.

        Args:
            purpose: What it was used for.
            text: Its name.
            stretches: Its token ids, as arrays of consecutive tokens, shape (length,).
        """
        tokens, kept = 0, np.empty(0, np.uint64)
        for ids in stretches:
            tokens += len(ids)
            hashes = _hashes(ids)
            if len(kept) == _KEPT:
                hashes = hashes[hashes < kept[-1]]
            kept = np.union1d(kept, hashes)[:_KEPT]
        return cls(purpose, text, tokens, base64.b64encode(kept.astype("<u8").tobytes()).decode())

    def share(self, hashes: np.ndarray) -> float:
        """An estimate of the overlap with another text, from 0 to 1.

        The larger of the share of the other text that is in this one and the share of this one that is in the other.

        Args:
            hashes: All hashes of the other text, as :func:`hashes_of` gives them.
        """
        ours = np.frombuffer(base64.b64decode(self.sketch), "<u8")
        # A full sketch holds no hash above its largest, so only those up to it can be compared.
        theirs = hashes[hashes <= ours[-1]] if len(ours) >= _KEPT else hashes
        common = len(np.intersect1d(ours, theirs, assume_unique=True))
        return max(common / max(1, len(theirs)), common / max(1, len(ours)))


def hashes_of(stretches: Iterable[np.ndarray]) -> np.ndarray:
    """All hashes of a text, each once, in rising order, uint64, shape (hashes,).

    Args:
        stretches: The text's token ids, as arrays of consecutive tokens, shape (length,).
    """
    found = [_hashes(ids) for ids in stretches]
    return np.unique(np.concatenate(found)) if found else np.empty(0, np.uint64)


def overlaps(model: Any, windows: Iterable[np.ndarray]) -> list[dict[str, Any]]:
    """The recorded texts of a model that the windows have at least 1 % in common with.

    Args:
        model: A model, perhaps with records attached or a card beside its files.
        windows: Token ids, shape (length,) each.

    Returns:
        For each text its ``purpose``, its name as ``text``, and the ``share`` in common; see :meth:`Seen.share`.
    """
    known, found = noted(model), []
    hashes = hashes_of(windows if known else ())
    for seen in known:
        share = seen.share(hashes)
        if share >= _LEAST:
            found.append({"purpose": seen.purpose, "text": seen.text, "share": round(share, 3)})
    return found


def sentence(overlap: Mapping[str, Any]) -> str:
    """One entry of :func:`overlaps` as an English sentence without a full stop."""
    words = _WORDS.get(overlap["purpose"], overlap["purpose"])
    return f"not held out: {overlap['share']:.0%} in common with the text that {words} ({overlap['text']})"


def note(model: Any, seen: Iterable[Seen]) -> None:
    """Attach records to a model in memory; saving the model writes them to its card."""
    setattr(model, _ATTRIBUTE, [*getattr(model, _ATTRIBUTE, ()), *seen])


def noted(model: Any) -> list[Seen]:
    """All records of a model, each once: those attached to it, and those in the card beside its files."""
    card = read_card(Path(getattr(model, "name_or_path", "") or "/nowhere"))
    return list(dict.fromkeys([*_of_card(card), *getattr(model, _ATTRIBUTE, ())]))


def with_notes(card: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """A copy of a model's card to which the records attached to the model are added."""
    every = dict.fromkeys([*_of_card(card), *getattr(model, _ATTRIBUTE, ())])
    return {**card, KEY: [asdict(seen) for seen in every]} if every else dict(card)


def _of_card(card: Mapping[str, Any]) -> list[Seen]:
    """The records in a card; entries that are malformed are passed over, since a card may come from anyone."""
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
    """A polynomial hash of every 12 consecutive tokens, uint64, shape (length − 11,)."""
    count = len(ids) - _STRETCH + 1
    if count < 1:
        return np.empty(0, np.uint64)
    mixed = _mix(ids.astype(np.uint64))
    total = np.zeros(count, np.uint64)
    for place in range(_STRETCH):
        total = total * np.uint64(0x9E3779B97F4A7C15) + mixed[place : place + count]
    return _mix(total)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014): a bijection of 64-bit numbers that spreads them evenly."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
