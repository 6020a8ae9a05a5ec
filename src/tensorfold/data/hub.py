"""The named data sets, and where they are on the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HubDataset:
    """A named data set on the Hugging Face hub.

    Args:
        path: Repository of the data set.
        config: Name of its configuration; ``None`` where it has only one.
        splits: Canonical names of its splits.
        rows_are_lines: Whether rows are lines of one text, joined by blank lines as in Hugging Face's recipe.
        first: How many rows are streamed from its beginning; ``None`` to download all.
    """

    path: str
    config: str | None
    splits: tuple[str, ...]
    rows_are_lines: bool = False
    first: int | None = None

    @property
    def origin(self) -> str:
        """Repository and configuration, for labels."""
        return f"{self.path}, {self.config}" if self.config else self.path


_WIKITEXT_SPLITS = ("train", "validation", "test")
HUB_DATASETS = {
    "wikitext-2": HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", _WIKITEXT_SPLITS, rows_are_lines=True),
    "wikitext-103": HubDataset("Salesforce/wikitext", "wikitext-103-raw-v1", _WIKITEXT_SPLITS, rows_are_lines=True),
    "wikitext-2-raw-v1": HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", _WIKITEXT_SPLITS, rows_are_lines=True),
    "wikitext-103-raw-v1": HubDataset(
        "Salesforce/wikitext", "wikitext-103-raw-v1", _WIKITEXT_SPLITS, rows_are_lines=True
    ),
    # The non-raw form (``<unk>``, `` @-@ ``) that the ``krony`` protocol asks for.
    "wikitext-2-v1": HubDataset("Salesforce/wikitext", "wikitext-2-v1", _WIKITEXT_SPLITS, rows_are_lines=True),
    "wikitext-103-v1": HubDataset("Salesforce/wikitext", "wikitext-103-v1", _WIKITEXT_SPLITS, rows_are_lines=True),
    "lambada": HubDataset("EleutherAI/lambada_openai", "default", ("test",)),
    "openwebtext": HubDataset("Skylion007/openwebtext", None, ("train",), first=100_000),
    "c4": HubDataset("allenai/c4", "en", ("train", "validation"), first=100_000),
}
