"""Tiny checkpoints, texts and recipes that the campaigns damage, kill and fold; equal in every run."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import tensorfold
from tensorfold.hf.loading import save

sys.path.append(str(Path(__file__).parents[2] / "tests"))

from byte_tokenizer import sentence_pairs

SENTENCES = (
    "The quick brown fox jumps over the lazy dog while the small cat watches from the old wall.",
    "A good tool does one thing well, says what went wrong, and leaves nothing half done behind it.",
    "Rain fell on the river all night, and by the morning every boat in the harbour was full of water.",
)
PROSE = "\n".join(f"{number}. {SENTENCES[number * 7 % 3]}" for number in range(90))
TOKENS = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
RECIPES = {
    "everything": [
        {"targets": "mlp", "method": "kronecker", "keep": 0.5, "scalars": True},
        {"targets": "attention", "method": "mpo", "keep": 0.5, "sites": 3},
        {"targets": "embedding", "method": "token-mps", "modes": [2, 2, 2, 4], "rank": 2},
    ],
    "graded": [
        {"targets": "all-linear", "method": "low-rank", "keep": 0.5, "pivots": True},
        {"targets": "embedding", "method": "graded", "keep": 0.5},
    ],
}


def tokenizer() -> Any:
    """Byte-level BPE with 300 tokens."""
    return sentence_pairs(PROSE)


def llama(layers: int = 2, width: int = 32) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=width * 3 // 2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        **TOKENS,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def make_templates(root: Path) -> Path:
    """``dense``, ``gpt2``, ``sharded``, ``folded``, ``graded``, ``int8``, ``prose.txt``, ``lines.jsonl`` in ``root``.

    Made once; a second call finds them.
    """
    if (root / "ready").exists():
        return root
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    words = tokenizer()
    (root / "prose.txt").write_text(PROSE, encoding="utf-8")
    lines = "".join(json.dumps({"text": line}) + "\n" for line in PROSE.split("\n"))
    (root / "lines.jsonl").write_text(lines, encoding="utf-8")
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **TOKENS)).eval()
    for name, model in (("dense", llama()), ("gpt2", gpt2), ("sharded", llama())):
        model.save_pretrained(root / name, max_shard_size="40KB" if name == "sharded" else "1GB")
        words.save_pretrained(root / name)
    for name, recipe in (("folded", "everything"), ("graded", "graded"), ("int8", "graded")):
        model = llama()
        report = tensorfold.fold(model, {"fold": RECIPES[recipe]})
        if name == "int8":
            tensorfold.quantize(model)
        save(model, words, root / name, {"base_model": "dense", "recipe": recipe, **report.to_dict()})
        lines = json.dumps({"perplexity": 21.5, "tokens": 9, "protocol": "disjoint-64", "text": "prose.txt"})
        (root / name / "tensorfold-evaluations.jsonl").write_text(lines + "\n", encoding="utf-8")
        step = {"stage": "end-to-end", "step": 1, "loss": 5.0, "lr": 1e-3, "seconds": 0.1}
        (root / name / "heal.jsonl").write_text(json.dumps(step) + "\n", encoding="utf-8")
        (root / name / "tensorfold-bench.json").write_text(json.dumps({"model": name, "layers": []}), encoding="utf-8")
    (root / "ready").touch()
    return root


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint's files, by name."""
    return {k: t for file in sorted(directory.glob("*.safetensors")) for k, t in load_file(file).items()}


def write_tensors(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
