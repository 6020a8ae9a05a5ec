"""Two trials of the search that changed nothing: measured prices, and one basis for matrices that share inputs.

    OMP_NUM_THREADS=1 python studies/smollm2/trials.py prices|stacked      # appends to trials.jsonl

*prices*: every MLP matrix of SmolLM2-135M alone is cut to the rank that 0.8 of its parameters buy, and the divergence
of the logits from the dense model's is measured on two windows of 512 tokens, beside the squared error that the search
predicts. If their ratio is the same for all, predictions divide a budget as measurements would.

*stacked*: squared errors of gate and up (or query, key and value) with a rank for each, the budget divided at one
price, and of their rows stacked with one rank: one basis of inputs for both. Texts are those of ``TENSORFOLD_DATA``.
"""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensorfold.algebra.allocation import Curve, allocate, pivoted_costs
from tensorfold.algebra.solvers.low_rank import error_curve, roots, whitened_low_rank
from tensorfold.algebra.statistics import shrunk
from tensorfold.calibration.block_stream import BlockStream, input_moments
from tensorfold.calibration.gradients import gradient_moments
from tensorfold.calibration.windows import calibration_windows
from tensorfold.data.texts import load_text
from tensorfold.folding.budgets import low_rank_spec
from tensorfold.hf.sources import find_model
from tensorfold.models.anatomy import by_block, matrices

LOG = Path(__file__).with_suffix(".jsonl")
DATA = Path(os.environ.get("TENSORFOLD_DATA", "."))
SHRINK, KEEP = 0.3, 0.8
SHARING = (("mlp.gate_proj", "mlp.up_proj"), ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))


def write(**entry: Any) -> None:
    print(entry, flush=True)
    with LOG.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


@torch.no_grad()
def prices() -> None:
    source = find_model("smollm2-135m")
    model = source.model().eval()
    windows = calibration_windows(source.tokenizer(), load_text("wikitext-2", split="validation"), 24_000)
    members = {name: matrix for name, matrix in matrices(model).items() if matrix.group == "mlp"}
    gradients = gradient_moments(model, windows, {name: each.module for name, each in members.items()}, rounded=True)
    judged = windows[[len(windows) // 3, 2 * len(windows) // 3]][:, :512]
    dense = model(judged, use_cache=False).logits.log_softmax(-1)
    stream = BlockStream(model, windows)
    for index, batch in sorted(by_block(members, stream.name).items()):
        stream.advance_to(index)
        moments = input_moments(partial(stream.advance, index), {name: each.module for name, each in batch.items()})
        for name, matrix in batch.items():
            weight, kept = matrix.parameter, matrix.parameter.clone()
            moment, gradient = shrunk(moments[name], SHRINK), gradients[name].full()
            rank = int((pivoted_costs(*weight.shape) <= KEEP * weight.numel()).sum()) - 1
            cores = whitened_low_rank(weight, moment, low_rank_spec(matrix, rank), gradient)
            predicted = float(error_curve(weight, moment, gradient)[rank])
            weight.copy_(cores[0].reshape(-1, rank) @ cores[1].reshape(rank, -1))
            logits = model(judged, use_cache=False).logits.log_softmax(-1)
            weight.copy_(kept)
            divergence = float((dense.exp() * (dense - logits)).sum(-1).mean())
            write(trial="prices", matrix=name, rank=rank, kl=round(divergence, 6), predicted=round(predicted, 6))


@torch.no_grad()
def stacked(indices: tuple[int, ...] = (2, 8, 14, 20, 26)) -> None:
    source = find_model("smollm2-135m")
    model = source.model().eval()
    windows = calibration_windows(source.tokenizer(), load_text(str(DATA / "mixture")), 8192)
    stream = BlockStream(model, windows)
    names = {index: [[f"{stream.name}.{index}.{name}" for name in group] for group in SHARING] for index in indices}
    modules = {name: model.get_submodule(name) for groups in names.values() for group in groups for name in group}
    gradients = gradient_moments(model, windows, modules, rounded=True)
    for index, groups in names.items():
        stream.advance_to(index)
        inside = {name: modules[name] for group in groups for name in group}
        moments = input_moments(partial(stream.advance, index), inside)
        for group in groups:
            weights = {name: modules[name].weight.double() for name in group}
            root = roots(shrunk(moments[group[0]], SHRINK).double(), weights[group[0]], ridge=0.0)[0]
            grams = {name: root @ w.T @ gradients[name].full().double() @ w @ root for name, w in weights.items()}
            curves = {
                name: Curve(_tails(gram)[: min(weights[name].shape) + 1], pivoted_costs(*weights[name].shape), 0.0)
                for name, gram in grams.items()
            }
            rows, columns = sum(len(w) for w in weights.values()), weights[group[0]].shape[1]
            whole = sum(float(curve.losses[0]) for curve in curves.values())
            chosen = allocate(curves, KEEP * rows * columns)
            apart = sum(float(curves[name].losses[at]) for name, at in chosen.items()) / whole
            rank = int((pivoted_costs(rows, columns) <= KEEP * rows * columns).sum()) - 1
            together = float(_tails(sum(grams.values()))[rank]) / whole  # type: ignore[arg-type]
            write(trial="stacked", block=index, matrices=[name.rpartition(".")[2] for name in group], keep=KEEP,
                  separate=round(apart**0.5, 4), stacked=round(together**0.5, 4), rank=rank)  # fmt: skip


def _tails(gram: Tensor) -> Tensor:
    """Squared errors of the best matrix of every rank from 0 on, from a matrix with its squared singular values."""
    energies = torch.linalg.eigvalsh((gram + gram.T) / 2).clamp_min(0)
    return torch.cat([energies.new_zeros(1), energies.cumsum(0)]).flip(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=["prices", "stacked"])
    {"prices": prices, "stacked": stacked}[parser.parse_args().trial]()
