"""Plan, fold, evaluate, save, load.

python examples/fold.py smollm2-135m --keep 0.8
"""

import argparse

import tensorfold
from tensorfold import LowRank, Recipe, Rule
from tensorfold.data.texts import load_text
from tensorfold.hf.loading import save
from tensorfold.hf.sources import find_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="hub id, directory, .gguf file or smollm2-135m")
parser.add_argument("--keep", type=float, default=0.8, help="fraction of the MLP's parameters that stays")
parser.add_argument("--text", default="python-docs")
parser.add_argument("--tokens", type=int, default=24_000, help="of the calibration text")
parser.add_argument("--protocol", default="hf-1024")
parser.add_argument("--max-tokens", type=int, default=8_192, help="of the test text")
parser.add_argument("--out", default="folded")
given = parser.parse_args()

source = find_model(given.model)
model, tokenizer = source.model(), source.tokenizer()
recipe = Recipe(fold=(Rule("mlp", LowRank(keep=given.keep)),))
print(tensorfold.plan(model.config, recipe))

test = load_text(given.text)


def measure(candidate):
    return tensorfold.evaluate(candidate, tokenizer, test, given.protocol, max_tokens=given.max_tokens)


print("dense: ", measure(model))
calibration = load_text(given.text, split="calibration")
report = tensorfold.fold(model, recipe, tokenizer, calibration, calibration_tokens=given.tokens)
save(model, tokenizer, given.out, {"base_model": source.name, "recipe": "examples/fold.py", **report.to_dict()})

folded = tensorfold.load(given.out)  # raises if anything is missing
print("folded:", measure(folded))
