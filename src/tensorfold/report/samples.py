"""Continuations of one prompt by every model of a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tensorfold.errors import TensorfoldError
from tensorfold.evaluation.sampling import context_room, continuation, generate, prompt_ids
from tensorfold.hf.sources import find_model
from tensorfold.report.facts import ModelFacts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sample:
    """A model's greedy continuation of the prompt.

    Attributes:
        label: The model's name on the page.
        text: Text after the prompt.
        tokens: Number of new tokens.
        problem: Reason why there is no text, if there is none.
    """

    label: str
    text: str = ""
    tokens: int = 0
    problem: str = ""


def sample_all(
    models: Sequence[ModelFacts], prompt: str, tokens: int, dtype: str | None = None, device: str | None = None
) -> Iterator[Sample]:
    """Samples of all models, one model in memory at a time; a model that cannot give one has a problem instead.

    Args:
        models: Facts about the models; each is loaded from its path.
        prompt: Text that is continued.
        tokens: New tokens in a sample, at most.
        dtype, device: Type of the weights and where they are put, as :meth:`~tensorfold.hf.sources.Source.model` takes
            them.
    """
    for model in models:
        try:
            yield _sample(model, prompt, tokens, dtype, device)
        except TensorfoldError as error:
            yield Sample(model.label, problem=str(error))


def _sample(model: ModelFacts, prompt: str, tokens: int, dtype: str | None, device: str | None) -> Sample:
    source = find_model(str(model.path))
    return sample_of(model.label, source.model(dtype, device), source.tokenizer(), prompt, tokens)


def sample_of(label: str, model: PreTrainedModel, tokenizer: Any, prompt: str, tokens: int) -> Sample:
    """Sample of one model, of at most as many tokens as its context has room for.

    Args:
        label: The model's name on the page.
        model: The model, an exported one too.
        tokenizer: Its tokenizer.
        prompt: Text that is continued.
        tokens: New tokens, at most.
    """
    ids = prompt_ids(tokenizer, prompt, model)
    room = context_room(len(ids), model)
    count = tokens if room is None else min(tokens, room)
    if count < 1:
        return Sample(label, problem=f"the prompt's {len(ids)} tokens fill the model's context.")
    given = generate(model, tokenizer, ids, count, do_sample=False)
    _, text = continuation(tokenizer, ids, given)
    return Sample(label, text, len(given) - len(ids))
