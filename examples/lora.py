"""An adapter on a folded model: LoRA beside folded layers and on them. Needs peft.

python examples/lora.py folded --text my.txt
"""

import argparse

import torch
from peft import LoraConfig, PeftModel, get_peft_model

import tensorfold
from tensorfold.data.texts import load_text
from tensorfold.data.tokens import Encoder
from tensorfold.hf.sources import find_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="a folded directory")
parser.add_argument("--text", default="python-docs")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--block", type=int, default=128, help="tokens in a window")
parser.add_argument("--out", default="adapter")
given = parser.parse_args()

source = find_model(given.model)
tokenizer = source.tokenizer()
ids = torch.tensor(Encoder(tokenizer)("\n\n".join(load_text(given.text))[:100_000]))
sequences = ids[: len(ids) // given.block * given.block].reshape(-1, 1, given.block)

config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
model = get_peft_model(source.model(), config)
model.print_trainable_parameters()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
for step in range(given.steps):
    batch = sequences[step % len(sequences)]
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
model.save_pretrained(given.out)

again = PeftModel.from_pretrained(tensorfold.load(source.path), given.out)
with torch.no_grad():
    assert torch.equal(again.eval()(batch).logits, model.eval()(batch).logits)
print(f"written to {given.out}")
