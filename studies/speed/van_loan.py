"""Van Loan's fit of all 24 MLP matrices of GPT-2 at (768, 768), against torch's randomised SVD of the same matrices.

    OMP_NUM_THREADS=2 python studies/speed/van_loan.py [--rounds 5] [--quick]

Krony-PT's code takes ``torch.svd_lowrank`` of the rearranged matrix; with q = 1 and 10 iterations it is about as
accurate as an exact one. Random float32 matrices of the real shapes, half with a decaying spectrum of Kronecker terms.
The two take turns, matrix by matrix; ratios are of the sums over all matrices in one round. Appends to
``van_loan.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from facts import facts
from torch import Tensor

from tensorfold import Kronecker
from tensorfold.algebra.contraction.apply import to_dense
from tensorfold.benchmark.timing import Spread

LOG = Path(__file__).with_suffix(".jsonl")
FACTOR = (768, 768)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--log", type=Path, default=LOG)
    parser.add_argument("--quick", action="store_true", help="Two matrices, to see that it runs.")
    given = parser.parse_args()
    matrices = [matrix(k) for k in range(2 if given.quick else 24)]
    rounds = 1 if given.quick else given.rounds
    ratios, ours, theirs, worst = [], [], [], -1.0
    for _ in range(rounds):
        took, other = 0.0, 0.0
        for weight in matrices:
            started = time.perf_counter()
            fitted = fit(weight)
            between = time.perf_counter()
            product = randomised(weight)
            other += time.perf_counter() - between
            took += between - started
            worst = max(worst, error(fitted(), weight) - error(product(), weight))
        ratios.append(other / took)
        ours.append(took)
        theirs.append(other)
    entry = {
        "matrices": len(matrices),
        "factor": FACTOR,
        "seconds": Spread.of(ours).to_dict(),
        "seconds_of_svd_lowrank": Spread.of(theirs).to_dict(),
        "times_as_fast": str(Spread.of(ratios)),
        "largest_excess_error": worst,
        "rounds": rounds,
        **facts(),
    }
    print(entry)
    with given.log.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def matrix(k: int) -> Tensor:
    """The k-th matrix: up (3072, 768) or down (768, 3072), noise alone or over a few Kronecker terms."""
    generator = torch.Generator().manual_seed(k)
    out, columns = (3072, 768) if k % 2 == 0 else (768, 3072)
    weight = torch.randn(out, columns, generator=generator)
    if k % 4 < 2:
        for term in range(3):
            a = torch.randn(768, 768, generator=generator)
            b = torch.randn(out // 768, columns // 768, generator=generator)
            weight += torch.kron(a, b) / (term + 1)
    return weight * 0.02


def fit(weight: Tensor) -> Callable[[], Tensor]:
    """Ours; the function multiplies the factors out."""
    method = Kronecker(factor=FACTOR)
    spec = method.spec(*weight.shape)
    factors = method.solve(weight, spec)
    return lambda: to_dense(factors.cores, spec)


def randomised(weight: Tensor) -> Callable[[], Tensor]:
    """By ``torch.svd_lowrank`` of the rearranged matrix."""
    (m1, n1), (m2, n2) = FACTOR, (weight.shape[0] // FACTOR[0], weight.shape[1] // FACTOR[1])
    rearranged = weight.reshape(m1, m2, n1, n2).permute(0, 2, 1, 3).reshape(m1 * n1, m2 * n2)
    u, s, v = torch.svd_lowrank(rearranged, q=1, niter=10)
    a, b = (u[:, 0] * s[0].sqrt()).reshape(m1, n1), (v[:, 0] * s[0].sqrt()).reshape(m2, n2)
    return lambda: torch.kron(a, b)


def error(product: Tensor, weight: Tensor) -> float:
    """Relative, in the Frobenius norm, in double precision."""
    return float((product.double() - weight.double()).norm() / weight.double().norm())


if __name__ == "__main__":
    main()
