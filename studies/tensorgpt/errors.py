"""Relative Frobenius errors of TensorGPT's chains: rows of SmolLM2-135M's table, and Gaussian rows as many.

    python studies/tensorgpt/errors.py

Appends to ``errors.jsonl``; what is there already is skipped.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from tensorfold.algebra.solvers.token_mps import token_mps_svd
from tensorfold.algebra.specs.token_mps import TokenMPSSpec, rows
from tensorfold.hf.sources import find_model

LOG = Path(__file__).with_suffix(".jsonl")
RANKS = (1, 2, 4, 6)


def tables() -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    """Tables and the modes of their rows: SmolLM2's as in smollm2.py, 768 numbers padded to 2^10 as in the paper."""
    table = find_model("smollm2-135m").model().get_input_embeddings().weight.detach().float()
    generator = torch.Generator().manual_seed(0)
    return {
        "SmolLM2-135M": (table, (2, 2, 2, 2, 2, 2, 3, 3)),
        "Gaussian": (torch.randn(table.shape, generator=generator), (2, 2, 2, 2, 2, 2, 3, 3)),
        "Gaussian, 768": (torch.randn(len(table), 768, generator=generator), (2,) * 10),
    }


def error(table: Tensor, spec: TokenMPSSpec) -> float:
    cores, squared = token_mps_svd(table, spec), 0.0
    for part in torch.arange(spec.vocabulary).split(4096):
        squared += float(
            (rows([core[part] for core in cores], spec.split)[:, : spec.width] - table[part]).square().sum()
        )
    return (squared / float(table.square().sum())) ** 0.5


def main() -> None:
    done = [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []
    for name, (table, modes) in tables().items():
        for rank in RANKS:
            if any((entry["table"], entry["rank"]) == (name, rank) for entry in done):
                continue
            spec = TokenMPSSpec(*table.shape, modes, rank)
            entry = {
                "table": name, "rank": rank, "modes": modes, "numbers_a_row": spec.parameters_per_token,
                "error": round(error(table, spec), 4),
            }  # fmt: skip
            with LOG.open("a") as file:
                file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
