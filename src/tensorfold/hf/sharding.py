"""Sharding of folded models by accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from tensorfold.nn import FoldedModule


@contextmanager
def as_accelerate_takes_it(model: PreTrainedModel | None) -> Iterator[None]:
    """Make a folded model look as accelerate needs it for sharding, while the context is open.

    accelerate wraps the classes that a device map may not divide, among which folded modules are: they are left out, so
    that whole blocks are wrapped. It finds ties by comparing ``weight``: a folded table and its head get one, since
    they share cores, and FSDP2 refuses to shard them apart.
    """
    if model is None:
        yield
        return
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    tied = all(isinstance(end, FoldedModule) for end in ends) and ends[0].cores[0] is ends[1].cores[0]
    whole = model._no_split_modules
    folded = {type(module).__name__ for module in model.modules() if isinstance(module, FoldedModule)}
    try:
        model._no_split_modules = set(whole or ()) - folded
        if tied:
            for end in ends:
                end.__dict__["weight"] = ends[0].cores[0]
        yield
    finally:
        model._no_split_modules = whole
        if tied:
            for end in ends:
                end.__dict__.pop("weight", None)
