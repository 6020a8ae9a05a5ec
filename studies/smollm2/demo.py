"""The recipe ``demo`` before and after, logged: python studies/smollm2/demo.py

On its own text, Python's documentation as the running interpreter has it. Appends to
``demo.jsonl``.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path

import tensorfold
from tensorfold import Recipe
from tensorfold.data.texts import load_text
from tensorfold.hf.sources import find_model

LOG = Path(__file__).with_suffix(".jsonl")
MAX_TOKENS = 16_384  # of the text that both models are evaluated on


def main() -> None:
    recipe = Recipe.load("demo")
    assert recipe.model
    assert recipe.eval
    assert recipe.calibrate
    source = find_model(recipe.model)
    model, tokenizer, test = source.model(), source.tokenizer(), load_text(recipe.eval.text)

    def measured() -> dict[str, float]:
        result = tensorfold.evaluate(model, tokenizer, test, recipe.eval.protocol, max_tokens=MAX_TOKENS)
        return {
            "perplexity": round(result.perplexity, 3), "accuracy": round(result.accuracy, 4),
            "tokens": result.tokens, "parameters": result.parameters,
        }  # fmt: skip

    dense = measured()
    calibration = load_text(recipe.calibrate.text, split="calibration")
    tensorfold.fold(model, recipe, tokenizer, calibration)
    entry = {"dense": dense, "folded": measured(), "protocol": recipe.eval.protocol, "text": recipe.eval.text,
             "python": platform.python_version()}  # fmt: skip
    print(entry)
    with LOG.open("a") as file:
        file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
