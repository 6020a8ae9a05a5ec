"""Kronecker fits of the real SmolLM2-135M's MLP: weighted ALS against Van Loan, and what permutations buy.

    python studies/krony/smollm2.py

Second moments are those of the dense model on the first 16,384 tokens of wikitext-2's validation split. Appends to
``smollm2.jsonl``; what is there already is skipped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensorfold.algebra.contraction.apply import to_dense
from tensorfold.algebra.orders.permutation import search_permutations, search_row_order
from tensorfold.algebra.solvers.als import weighted_als
from tensorfold.algebra.solvers.solve import relative_error
from tensorfold.algebra.solvers.ttsvd import tt_svd
from tensorfold.algebra.specs.spec import Spec
from tensorfold.calibration.block_stream import BlockStream
from tensorfold.calibration.windows import calibration_windows
from tensorfold.data.texts import load_text
from tensorfold.hf.sources import find_model
from tensorfold.models.modes import evaluation_mode

LOG = Path(__file__).with_suffix(".jsonl")
LAYERS = (0, 7, 15, 22, 29)
TOKENS = 16_384


def small_factor(weight: Tensor, small: tuple[int, int], terms: int) -> Spec:
    """Σ A ⊗ B with B of the given shape."""
    rows, columns = weight.shape
    return Spec.kronecker(rows, columns, (rows // small[0], columns // small[1]), terms)


def fits(weight: Tensor, metric: Tensor, small: tuple[int, int], terms: int) -> dict[str, float]:
    spec = small_factor(weight, small, terms)
    start = tt_svd(weight, spec)
    fit = weighted_als(weight, spec, start, metric)
    return {
        "kept": spec.parameters / spec.dense_parameters,
        "van_loan": relative_error(weight, to_dense(start, spec), metric),
        "weighted_als": relative_error(weight, to_dense(fit.cores, spec), metric),
        "sweeps": len(fit.errors) - 1,
    }


def orders(mlp: dict[str, Tensor]) -> dict[str, Any]:
    """Frobenius errors at half the parameters: one common hidden order for the three matrices, and each by itself."""
    specs = {name: small_factor(w, (2, 1) if w.shape[0] > w.shape[1] else (1, 2), 1) for name, w in mlp.items()}
    views = [(mlp[n].T, specs[n].transposed) if n == "down_proj" else (mlp[n], specs[n]) for n in mlp]
    _, joint, without = search_row_order(views)
    out: dict[str, Any] = {"common_hidden_order": {"without": without, "with": joint}}
    for name, weight in mlp.items():
        found = search_permutations(weight, specs[name])
        out[name] = {"without": found.error_without, "both_sides": found.error}
    return out


def main() -> None:
    torch.set_num_threads(1)
    done = {json.loads(line)["what"] for line in LOG.read_text().splitlines()} if LOG.exists() else set()
    source = find_model("smollm2-135m")
    model, tokenizer = source.model(), source.tokenizer()
    windows = calibration_windows(tokenizer, load_text("wikitext-2", split="validation"), TOKENS)

    def record(what: str, work: Callable[[], dict[str, Any]]) -> None:
        if what in done:
            return
        started = time.monotonic()
        entry = {"what": what, **work(), "seconds": round(time.monotonic() - started, 1)}
        with LOG.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(entry, flush=True)

    with evaluation_mode(model), torch.no_grad():
        stream = BlockStream(model, windows)
        for layer in LAYERS:
            stream.advance_to(layer)
            mlp = stream.blocks[layer].mlp
            modules = {name: getattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")}
            moments = stream.input_moments(layer, modules)
            weights = {name: module.weight.detach() for name, module in modules.items()}
            for name, weight in weights.items():
                record(f"{layer}.{name} (1, 2)", lambda w=weight, c=moments[name]: fits(w, c, (1, 2), 1))
            if layer == 15:
                gate = weights["gate_proj"]
                record("15.gate_proj (4, 4) × 8", lambda w=gate, c=moments["gate_proj"]: fits(w, c, (4, 4), 8))
            if layer in (7, 15, 29):
                record(f"{layer} permutations", lambda w=weights: orders(w))


if __name__ == "__main__":
    main()
