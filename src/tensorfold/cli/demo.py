"""The demo: SmolLM2-135M folded, and its size and quality before and after."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

import tensorfold
from tensorfold.data.texts import describe, in_form, load_text
from tensorfold.evaluation.perplexity import evaluate
from tensorfold.evaluation.protocols import form_needed
from tensorfold.evaluation.result import Evaluation
from tensorfold.folding.in_memory import fold
from tensorfold.folding.plan import plan
from tensorfold.hf.loading import load, save
from tensorfold.hf.model_card import source_line
from tensorfold.hf.sources import find_model
from tensorfold.recipes.recipe import Recipe
from tensorfold.utils.atomic_files import check_target
from tensorfold.utils.records import read_card

PROMPT = "The most important thing about a good tool is"
MAX_TOKENS = 16_384  # of the text that both models are evaluated on


def run_demo(out: Path) -> None:
    """Fold ``smollm2-135m`` by the recipe ``demo``, print sizes, perplexities and a sentence, and write ``out``.

    Raises:
        InputError: ``out`` holds something else than an earlier demo, or the carrier of the model is not installed.
        TensorfoldError: The disk is full.
    """
    console = Console()
    started = time.monotonic()
    replace = _is_of_a_demo(out)
    check_target(out, may_exist=replace)
    recipe = Recipe.load("demo")
    judge, calibrate = recipe.eval, recipe.calibrate
    assert recipe.model is not None
    assert judge is not None
    assert calibrate is not None
    console.print(f"Reading {recipe.model} (converted from its GGUF file at the first run) …")
    source = find_model(recipe.model)
    if source.stored is not None:
        console.print(f"Its weights are {source_line(source.stored)}.", highlight=False, soft_wrap=True)
    tokenizer = source.tokenizer()
    model = source.model()
    console.print(str(plan(model, recipe)), highlight=False, soft_wrap=True)

    judged = in_form(judge.text, form_needed(judge.protocol))
    test, label = load_text(judged), describe(judged)

    def measure(candidate: PreTrainedModel) -> Evaluation:
        return evaluate(
            candidate, tokenizer, test, judge.protocol, max_tokens=judge.max_tokens or MAX_TOKENS, text_name=label
        )

    console.print(f"Measuring the dense model on {label} …")
    before, sentence_before = measure(model), _sentence(model, tokenizer)
    console.print(f"Folding, calibrated on {calibrate.tokens:,} tokens of {calibrate.text} …")
    calibration = load_text(calibrate.text, split="calibration")
    report = fold(model, recipe, tokenizer, calibration, progress=sys.stderr.isatty())
    card = {
        "base_model": source.name,
        "recipe": recipe.name,
        "calibration": f"{report.calibration_tokens} tokens of {describe(calibrate.text, 'calibration')}",
        **report.to_dict(),
        "tensorfold": tensorfold.__version__,
    }
    if source.stored is not None:
        card["source"] = source.stored
    save(model, tokenizer, out, card, replace=replace)
    console.print("Measuring the folded model, as loaded from its directory …")
    folded = load(out)
    after, sentence_after = measure(folded), _sentence(folded, tokenizer)

    table = Table(box=None)
    for heading in ("", "dense", "folded", "ratio"):
        table.add_column(heading, justify="left" if not heading else "right")
    rows: list[tuple[str, float, float, str]] = [
        ("parameters", before.parameters, after.parameters, ",.0f"),
        ("MB in fp32", before.parameters * 4 / 1e6, after.parameters * 4 / 1e6, ".0f"),
        (
            f"perplexity ({before.protocol}, {before.text}, {before.tokens:,} tokens)",
            before.perplexity,
            after.perplexity,
            ".2f",
        ),
        ("next-token accuracy", before.accuracy, after.accuracy, ".1%"),
    ]
    for name, dense, small, form in rows:
        table.add_row(name, format(dense, form), format(small, form), f"{small / dense:.2f}×")
    console.print(table)
    console.print(f"dense:  {sentence_before}", highlight=False)
    console.print(f"folded: {sentence_after}", highlight=False)
    console.print(
        f"\n{time.monotonic() - started:.0f} s. The folded model is in {out}:\n"
        f"  import tensorfold; model = tensorfold.load({str(out)!r})",
        highlight=False,
    )


def _is_of_a_demo(out: Path) -> bool:
    """Whether an earlier demo wrote the directory, which alone may be replaced."""
    return read_card(out).get("recipe") == "demo"


def _sentence(model: PreTrainedModel, tokenizer: Any) -> str:
    """One greedily generated sentence after the fixed prompt."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    text = tokenizer.decode(ids[0], skip_special_tokens=True).replace("\n", " ")
    end = text.find(". ", len(PROMPT))
    return text if end < 0 else text[: end + 1]
