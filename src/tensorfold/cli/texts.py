"""Texts of ``compress``: what is calibrated and trained on, what of the same text is held out, and an unseen one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorfold.errors import InputError
from tensorfold.utils.atomic_files import atomic_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CALIBRATION, HELD_OUT, UNSEEN = "calibration", "held-out", "unseen"
_HELD_OUT = 10  # one in so many characters of a text without splits is held out


def unseen_of(texts: Sequence[str], given: str | None) -> str:
    """The text to be judged by besides: the given one, else one that every machine has and that is not among ``texts``.

    Raises:
        InputError: Both that every machine has are calibrated on.
    """
    from tensorfold.calibration.own_text import SELF

    if given is not None:
        return given
    free = [name for name in ("python-docs", SELF) if name not in texts]
    if not free:
        raise InputError(
            "compress: --text python-docs and --text self leave no text to judge by that was not calibrated on; give "
            "--unseen TEXT."
        )
    return free[0]


def check_texts(texts: Sequence[str], unseen: str) -> None:
    """Raise :class:`InputError` for a text that there is none of, or that is given twice, before anything is loaded."""
    from tensorfold.calibration.own_text import check_named

    if unseen in texts or len(set(texts)) < len(texts):
        raise InputError("compress: got a text twice; needed other texts for each --text and for --unseen.")
    check_named(texts, "validation")
    check_named(unseen, "test")


def hashes_of(texts: Sequence[str]) -> list[list[str]]:
    """SHA-256 of the files that each text is in, except the model's own, so that a changed one is read anew."""
    from tensorfold.calibration.own_text import SELF
    from tensorfold.data.texts import locate

    found = [locate(text, split) for text in texts if text != SELF for split in ("validation", "test")]
    return [[hashlib.sha256(file.read_bytes()).hexdigest() for file in each.files or ()] for each in found]


def write_texts(
    directory: Path,
    texts: Sequence[str],
    unseen: str,
    model: PreTrainedModel,
    tokenizer: Any,
    tokens: int,
    judged: int,
    progress: bool,
) -> None:
    """Write the parts of the texts as ``.jsonl`` files into a directory, whole or not at all.

    Several texts have equal shares of the calibration tokens and of the judged ones.

    Args:
        directory: Directory to write.
        texts: Texts to calibrate on.
        unseen: Text to judge by besides.
        model: The dense model, which writes the text ``self``.
        tokenizer: Its tokenizer.
        tokens: Calibration tokens.
        judged: Tokens of each judged part.
        progress: Whether progress bars are shown.
    """
    parts: dict[str, list[str]] = {CALIBRATION: [], HELD_OUT: []}
    for text in texts:
        share, held = tokens // len(texts), judged // len(texts)
        first, last = _divided(text, model, tokenizer, share, held, progress)
        alone = len(texts) == 1
        parts[CALIBRATION] += first if alone else _beginning(tokenizer, first, share)
        parts[HELD_OUT] += last if alone else _beginning(tokenizer, last, held)
    parts[UNSEEN] = _judge(unseen, model, tokenizer, judged, progress)
    with atomic_directory(directory) as partial:
        for part, documents in parts.items():
            lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
            (partial / f"{part}.jsonl").write_text(lines, encoding="utf-8")


def _divided(
    text: str, model: PreTrainedModel, tokenizer: Any, tokens: int, judged: int, progress: bool
) -> tuple[list[str], list[str]]:
    """Documents to calibrate on, and held-out documents of the same text."""
    from tensorfold.calibration.own_text import SELF, own_text
    from tensorfold.data.texts import load_text, locate

    if text == SELF:
        return own_text(model, tokenizer, tokens, progress=progress), _judge(text, model, tokenizer, judged, progress)
    if locate(text, "validation") != locate(text, "test"):
        where = {each: locate(text, each) for each in ("validation", "test")}
        if where["validation"].files != where["test"].files or where["test"].files is None:
            return load_text(text, split="validation"), load_text(text, split="test")
    return _cut(load_text(text))


def _judge(text: str, model: PreTrainedModel, tokenizer: Any, judged: int, progress: bool) -> list[str]:
    """Documents of a text to judge by; what a model writes itself begins with another seed than for calibration."""
    from tensorfold.calibration.own_text import SELF, own_text
    from tensorfold.data.texts import load_text

    if text == SELF:
        return own_text(model, tokenizer, judged, seed=1, progress=progress)
    return load_text(text, split="test")


def _cut(documents: list[str]) -> tuple[list[str], list[str]]:
    """The first nine tenths of the documents, or of the only one, cut between paragraphs, and the rest."""
    if len(documents) >= _HELD_OUT:
        cut = len(documents) - len(documents) // _HELD_OUT
        return documents[:cut], documents[cut:]
    text = "\n\n".join(documents)
    place = len(text) - len(text) // _HELD_OUT
    for end in ("\n\n", "\n", " "):
        found = text.find(end, place)
        if 0 < found < len(text) - len(end):
            return [text[:found]], [text[found + len(end) :]]
    return [text[:place]], [text[place:]]


def _beginning(tokenizer: Any, documents: list[str], tokens: int) -> list[str]:
    """The first documents, the last one cut, that have so many tokens."""
    taken: list[str] = []
    left = tokens
    for document in documents:
        # Of long documents only as much is tokenised as could be needed.
        ids = tokenizer(document[: 16 * left + 64], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) > left:
            return [*taken, tokenizer.decode(ids[:left], skip_special_tokens=True)]
        taken.append(document)
        left -= len(ids)
        if left <= 0:
            break
    return taken
