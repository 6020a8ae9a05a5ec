"""Fold hard, then train against the dense model.

python examples/heal.py smollm2-135m --keep 0.5 --steps 200
"""

import argparse

import tensorfold
from tensorfold.data.texts import load_text
from tensorfold.hf.sources import find_model
from tensorfold.recipes.settings import HealSettings

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="hub id, directory, .gguf file or smollm2-135m")
parser.add_argument("--keep", type=float, default=0.5, help="fraction of the MLP's parameters that stays")
parser.add_argument("--text", default="python-docs")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--block", type=int, default=512, help="tokens in a window")
parser.add_argument("--out", default="healed")
given = parser.parse_args()

source = find_model(given.model)
model, tokenizer = source.model(), source.tokenizer()
text = load_text(given.text, split="calibration")
print(tensorfold.fold(model, tensorfold.LowRank(keep=given.keep), tokenizer, text))

settings = HealSettings(steps=given.steps, batch=2, block=given.block, lr=1.5e-4, warmup=2, kl=1.0)
report = tensorfold.heal(model, text, source.model(), tokenizer=tokenizer, settings=settings, out=given.out)
print(report)
