"""The demo: ``compress`` on the real SmolLM2-135M, by text that it writes itself and Python's documentation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorfold.cli.pipeline import Order

MODEL = "smollm2-135m"


def order() -> Order:
    """What the demo asks for: some minutes on two cores; ``studies/demo`` has the curve that its size is taken from."""
    from tensorfold.calibration.own_text import SELF
    from tensorfold.cli.pipeline import Order

    return Order(
        model=MODEL,
        size=0.94,
        most=None,
        texts=(SELF,),
        unseen="python-docs",
        minutes=0,
        engine=_engine(),
        bits=None,
        plain=False,
        effort="low",
        tokens=4096,
        judged=4096,
    )


def run_demo(out: Path, device: str | None = None) -> None:
    """Compress ``smollm2-135m`` into ``out``; print a table, what the model says before and after, and where it all is.

    Args:
        out: Directory of the run.
        device: Where models compute; the CPU if None.

    Raises:
        InputError: ``out`` holds something else than an earlier demo, or the carrier of the model is not installed.
        TensorfoldError: The disk is full.
    """
    from tensorfold.cli.pipeline import Pipeline
    from tensorfold.hf.model_card import source_line
    from tensorfold.hf.sources import find_model

    asked = dataclasses.replace(order(), device=device)
    source = find_model(asked.model)
    outcome = Pipeline(asked, out).run()  # what is refused leaves standard output empty
    if source.stored is not None:
        print(f"The weights of {asked.model} are {source_line(source.stored)}.")
    print(outcome)
    for sample in (outcome.samples[0], outcome.samples[-1]):
        print(f"{sample['label']}: {_sentence(outcome.prompt, sample['text'])}")


def _engine() -> str:
    """The first engine whose packages are installed; transformers where none is."""
    from tensorfold.errors import InputError
    from tensorfold.export.tracing import check_packages

    for engine in ("openvino", "onnx"):
        try:
            check_packages(engine)
            return engine
        except InputError:
            continue
    return "transformers"


def _sentence(prompt: str, text: str) -> str:
    """A prompt and what follows it, to the end of the first sentence."""
    text = text.replace("\n", " ")
    end = text.find(". ")
    return prompt + (text if end < 0 else text[: end + 1])
