"""The demo: ``compress`` on the real SmolLM2-135M, by text that it writes itself and Python's documentation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tensorfold.cli.pipeline import Order

MODEL = "smollm2-135m"
PROMPT = "The most important thing about a good tool is"


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
        plain=True,
        effort="medium",
        tokens=4096,
        judged=4096,
    )


def run_demo(out: Path) -> None:
    """Compress ``smollm2-135m`` into ``out``; print a table, what the model says before and after, and where it all is.

    Raises:
        InputError: ``out`` holds something else than an earlier demo, or the carrier of the model is not installed.
        TensorfoldError: The disk is full.
    """
    from tensorfold.cli.pipeline import Pipeline
    from tensorfold.export.engine_model import find_runnable
    from tensorfold.hf.model_card import source_line
    from tensorfold.hf.sources import find_model

    asked = order()
    source = find_model(asked.model)
    outcome = Pipeline(asked, out).run()  # what is refused leaves standard output empty
    if source.stored is not None:
        print(f"The weights of {asked.model} are {source_line(source.stored)}.")
    print(outcome)
    tokenizer = source.tokenizer()
    for row in (outcome.rows[0], outcome.rows[-1]):
        print(f"{row.name}: {_sentence(find_runnable(row.path).model(), tokenizer)}")


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


def _sentence(model: PreTrainedModel, tokenizer: Any) -> str:
    """One greedily generated sentence after the fixed prompt."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    text = tokenizer.decode(ids[0], skip_special_tokens=True).replace("\n", " ")
    end = text.find(". ", len(PROMPT))
    return text if end < 0 else text[: end + 1]
