"""What every model makes of the same prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tensorfold.errors import TensorfoldError
from tensorfold.evaluation.sampling import context_room, continuation, generate, prompt_ids
from tensorfold.hf.sources import find_model
from tensorfold.report.facts import ModelFacts


@dataclass(frozen=True)
class Sample:
    """Greedy text after the prompt; without it, ``problem`` says why."""

    label: str
    text: str = ""
    tokens: int = 0
    problem: str = ""


def sample_all(models: Sequence[ModelFacts], prompt: str, tokens: int) -> Iterator[Sample]:
    """One sample a model, one model in memory at a time. A model that cannot give one costs a line, not the report."""
    for model in models:
        try:
            yield _sample(model, prompt, tokens)
        except TensorfoldError as error:
            yield Sample(model.label, problem=str(error))


def _sample(model: ModelFacts, prompt: str, tokens: int) -> Sample:
    source = find_model(str(model.path))
    tokenizer, loaded = source.tokenizer(), source.model()
    ids = prompt_ids(tokenizer, prompt, loaded)
    room = context_room(len(ids), loaded)
    count = tokens if room is None else min(tokens, room)
    if count < 1:
        return Sample(model.label, problem=f"the prompt's {len(ids)} tokens fill the model's context.")
    given = generate(loaded, tokenizer, ids, count, do_sample=False)
    _, text = continuation(tokenizer, ids, given)
    return Sample(model.label, text, len(given) - len(ids))
