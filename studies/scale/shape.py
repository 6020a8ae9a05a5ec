"""A random Llama-shaped checkpoint in bf16 shards: python studies/scale/shape.py OUT [--blocks 31] [--width 2048]

With the defaults 1.5 G parameters, 3.0 GB. It is written block by block, with SmolLM2's tokenizer beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers

from tensorfold.hf.on_disk import own_tensors, save_configuration
from tensorfold.hf.shard_writer import ShardWriter
from tensorfold.hf.sources import find_model
from tensorfold.models.anatomy import count_parameters, empty_model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", type=int, default=31)
    parser.add_argument("--width", type=int, default=2048)
    given = parser.parse_args()
    tokenizer = find_model("smollm2-135m").tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=given.width, intermediate_size=given.width * 11 // 4,
        num_hidden_layers=given.blocks, num_attention_heads=given.width // 64, num_key_value_heads=given.width // 256,
        max_position_embeddings=2048, tie_word_embeddings=True, dtype=torch.bfloat16,
    )  # fmt: skip
    model = empty_model(config)
    model = model.to(torch.bfloat16)
    given.out.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    own = own_tensors(model)
    with ShardWriter(given.out, own, count_parameters(model), 5 * 10**8) as writer:
        for name, tensor in own.items():
            if tensor.dim() == 1:
                writer.write(name, torch.ones(tensor.shape, dtype=tensor.dtype))
                continue
            scale = 0.02 if "embed" in name else tensor.shape[1] ** -0.5
            writer.write(name, (scale * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype))
    save_configuration(model, given.out)
    tokenizer.save_pretrained(given.out)
    print(f"{count_parameters(model):,} parameters")


if __name__ == "__main__":
    main()
