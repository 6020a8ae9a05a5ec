"""Calibration text as a fold uses it: windows of tokens, and how often each token occurs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from tensorfold.calibration.own_text import documents_of
from tensorfold.calibration.windows import Documents, calibration_windows, texts_of, token_counts
from tensorfold.data.seen_text import CALIBRATION, Seen, note
from tensorfold.data.tokens import check_ids, prefix_of
from tensorfold.errors import InputError
from tensorfold.folding.plan import Plan
from tensorfold.models.anatomy import Matrix, context_length, matrices
from tensorfold.recipes.recipe import Recipe
from tensorfold.recipes.settings import CalibrateSettings
from tensorfold.utils.validation import check_types


@dataclass(frozen=True, eq=False)
class Text:
    """Calibration text, or that there is none.

    Attributes:
        windows: Token ids, shape (windows, length); None where the fold is data-free.
        prefix: Token ids that the tokenizer puts before a document, with which every window begins.
        counts: How often the whole text uses each token, shape (vocabulary,), where a method asks for it.
        documents: The text itself; of several, all their documents.
        name: What the report calls it.
    """

    windows: Tensor | None = None
    prefix: tuple[int, ...] = ()
    counts: Tensor | None = None
    documents: tuple[str, ...] = ()
    name: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of all windows together."""
        return 0 if self.windows is None else self.windows.numel()

    @property
    def window(self) -> int:
        """Tokens of one window."""
        return 0 if self.windows is None else self.windows.shape[1]

    def counted(self, model: PreTrainedModel, planned: Plan, tokenizer: Any) -> Text:
        """The text with its counts, where the method of the embedding asks for them."""
        table = next((name for name, matrix in matrices(model).items() if matrix.group == "embedding"), "")
        method = planned.methods.get(table)
        if self.windows is None or method is None or not (method.fits_text or method.token_order == "frequency"):
            return self
        return replace(self, counts=token_counts(tokenizer, self.documents, planned.modules[table].out_features))

    def knows(self, matrix: Matrix) -> bool:
        """Whether it says anything of the matrix: of linear layers, and of the table by which tokens go in."""
        if self.windows is None:
            return False
        return matrix.kind == "linear" or (self.counts is not None and matrix.group == "embedding")

    def note_in(self, model: PreTrainedModel) -> None:
        """Write down in the model what text it has seen."""
        if self.windows is not None:
            note(model, [Seen.of(CALIBRATION, self.name, self.windows.numpy())])


def read_text(
    model: PreTrainedModel,
    recipe: Recipe,
    tokenizer: Any,
    calibration: Documents | None,
    tokens: int | None,
) -> Text:
    """The text given, else the one that the recipe names, in windows of the model's length.

    Args:
        calibration: Documents, or a list of them for each of several texts.
        tokens: How many tokens of them; the recipe's number, else 24,000.

    Raises:
        InputError: The text, the tokenizer or the number of tokens cannot be used.
    """
    documents = _documents(model, recipe, tokenizer, calibration, tokens)
    if documents is None:
        if tokens is not None:
            raise InputError(
                f"fold: calibration_tokens={tokens} has no effect here; it needs calibration text: calibration=[…], or "
                "a recipe with calibrate, and the tokenizer."
            )
        return Text()
    check_types("fold", calibration_tokens=(tokens, int | None))
    settings = recipe.calibrate or CalibrateSettings()
    windows = calibration_windows(tokenizer, documents, tokens or settings.tokens, context_length(model.config))
    check_ids(model, windows, "calibration", tokenizer)
    named = " and ".join(recipe.calibrate.texts) if calibration is None and recipe.calibrate else "the text given"
    return Text(windows, prefix_of(tokenizer), None, tuple(chain.from_iterable(documents)), named)


def _documents(
    model: PreTrainedModel, recipe: Recipe, tokenizer: Any, calibration: Documents | None, tokens: int | None
) -> list[list[str]] | None:
    if calibration is None and recipe.calibrate is not None:
        if tokenizer is None:
            warnings.warn(
                f"the recipe calibrates on {' and '.join(recipe.calibrate.texts)!r}, but fold got no tokenizer: "
                "folding without calibration.",
                stacklevel=4,
            )
        else:
            settings = recipe.calibrate
            calibration = documents_of(settings.texts, model, tokenizer, tokens or settings.tokens, split="validation")
    if calibration is None:
        return None
    if tokenizer is None:
        raise InputError("fold: got calibration text without a tokenizer; needed the model's tokenizer.")
    check_types("fold", calibration=(calibration, Iterable))
    return texts_of(calibration)
