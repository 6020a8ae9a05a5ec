"""Second moments of the dense SmolLM2-135M, for structures.py: C of 24,000 tokens and G of 8,192."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tensorfold.calibration.block_stream import BlockStream
from tensorfold.calibration.gradients import gradient_moments
from tensorfold.calibration.windows import calibration_windows
from tensorfold.data.texts import load_text
from tensorfold.models.anatomy import dense_weight, matrices

BLOCKS = (15, 4, 26)
KINDS = {"down_proj": "mlp", "up_proj": "mlp", "gate_proj": "mlp"} | dict.fromkeys(
    ("o_proj", "q_proj", "v_proj"), "self_attn"
)
Known = dict[str, tuple[Tensor, Tensor, Tensor]]  # by name: W (out, in), C (in, in), G (out, out)


@torch.no_grad()
def statistics(model: Any, tokenizer: Any) -> Known:
    whole = "\n\n".join(load_text("wikitext-2", split="validation"))
    windows = calibration_windows(tokenizer, [whole], 24_000)
    chosen = {}
    for name, matrix in matrices(model).items():
        kind = name.rpartition(".")[2]
        if kind in ("v_proj", "o_proj") or (kind in KINDS and int(name.split(".")[2]) in BLOCKS):
            chosen[name] = matrix
    gradients = gradient_moments(model, windows[:8], {name: matrix.module for name, matrix in chosen.items()})
    known, stream = {}, BlockStream(model, windows)
    for index in range(len(stream.blocks)):
        batch = {name: matrix for name, matrix in chosen.items() if int(name.split(".")[2]) == index}
        moments = stream.input_moments(index, {name: matrix.module for name, matrix in batch.items()})
        for name, matrix in batch.items():
            known[name] = (dense_weight(matrix.module).detach().clone(), moments[name], gradients[name].full())
        stream.advance(index)
    return known


def name_of(kind: str, block: int) -> str:
    return f"model.layers.{block}.{KINDS[kind]}.{kind}"
