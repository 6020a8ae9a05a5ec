"""A small mixture of experts, shaped as Qwen3-MoE, trained on the texts of ``$TENSORFOLD_DATA/mixture``.

    OMP_NUM_THREADS=1 python studies/scale/tiny_mixture.py --out DIR [--minutes M]

Every document belongs to one of three parts by a hash of its text: 90 % to train, 5 % to choose by (``valid.jsonl``),
5 % to report (``test.jsonl``). The tokenizer is a byte-level BPE of the training part. Passes run under bfloat16
autocast, the weights stay in float32. The learning rate follows the minutes that were spent; a run that is
stopped goes on from its last checkpoint. ``DIR/model`` is the model, ``DIR/losses.jsonl`` its losses.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig

VOCABULARY, LENGTH, BATCH = 2048, 256, 8
RATE, WARM, FINAL = 3e-3, 0.03, 0.05  # peak; fractions of the time, and of the peak
SAVE_EVERY = 120  # seconds
PARTS = ("train", "valid", "test")


def part_of(document: str) -> str:
    """Part that a document belongs to."""
    number = int.from_bytes(hashlib.sha256(document.encode()).digest()[:4], "big") / 2**32
    return "train" if number < 0.9 else "valid" if number < 0.95 else "test"


def documents() -> Iterator[str]:
    """Documents of every file, which two blank lines part."""
    for file in sorted((Path(os.environ["TENSORFOLD_DATA"]) / "mixture").glob("*.txt")):
        yield from (text for part in file.read_text(encoding="utf-8").split("\n\n\n") if (text := part.strip()))


def prepare(out: Path) -> None:
    """Write the parts as JSON lines, the tokenizer, and the training part's token ids."""
    texts: dict[str, list[str]] = {name: [] for name in PARTS}
    for text in documents():
        texts[part_of(text)].append(text)
    for name, found in texts.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in found)
        (out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet)
    plain.train_from_iterator(texts["train"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>")
    tokenizer.save_pretrained(out / "tokenizer")
    ids = [token for each in plain.encode_batch(texts["train"]) for token in (*each.ids, tokenizer.eos_token_id)]
    np.save(out / "train.npy", np.array(ids, dtype=np.uint16))


def config() -> Qwen3MoeConfig:
    """Configuration of the model: 4 blocks of width 192, 16 experts of which 2 read a token."""
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=192, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2,
        head_dim=32, num_experts=16, num_experts_per_tok=2, moe_intermediate_size=224, intermediate_size=224,
        max_position_embeddings=512, tie_word_embeddings=True, norm_topk_prob=True, router_aux_loss_coef=0.003,
        output_router_logits=True, eos_token_id=0, bos_token_id=None, pad_token_id=None, decoder_sparse_step=1,
    )  # fmt: skip


def rate(done: float) -> float:
    """Learning rate after a fraction of the time."""
    if done < WARM:
        return RATE * max(done, 1e-3) / WARM
    return RATE * (FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * (done - WARM) / (1 - WARM))))


def train(out: Path, minutes: float) -> None:
    """Train for so many minutes of wall time, checkpoints included, and save the model."""
    ids = torch.from_numpy(np.load(out / "train.npy").astype(np.int64))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(), attn_implementation="sdpa", experts_implementation="grouped_mm")
    print(sum(p.numel() for p in model.parameters()), "parameters,", len(ids), "tokens", flush=True)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    checkpoint, spent, step = out / "checkpoint.pt", 0.0, 0
    if checkpoint.is_file():
        held = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
        spent, step = held["spent"], held["step"]
    started, saved, losses = time.monotonic() - spent, time.monotonic(), []
    windows = (len(ids) - 1) // LENGTH
    while (spent := time.monotonic() - started) < minutes * 60:
        order = torch.randperm(windows, generator=torch.Generator().manual_seed(step * BATCH // windows))
        at = step * BATCH % windows
        batch = torch.stack([ids[k * LENGTH : (k + 1) * LENGTH] for k in order[at : at + BATCH].tolist()])
        for group in optimizer.param_groups:
            group["lr"] = rate(spent / (minutes * 60))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        step += 1
        if step % 50 == 0:
            entry = {"step": step, "tokens": step * BATCH * LENGTH, "seconds": round(spent), "loss": sum(losses) / 50}
            with (out / "losses.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            losses.clear()
        if time.monotonic() - saved > SAVE_EVERY:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "spent": spent, "step": step}
            torch.save(state, out / "checkpoint.tmp")
            (out / "checkpoint.tmp").replace(checkpoint)
            saved = time.monotonic()
    model.config.output_router_logits = False
    model.save_pretrained(out / "model")
    PreTrainedTokenizerFast.from_pretrained(out / "tokenizer").save_pretrained(out / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=45)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if not (args.out / "train.npy").is_file():
        prepare(args.out)
    train(args.out, args.minutes)


if __name__ == "__main__":
    main()
