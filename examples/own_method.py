"""A method of one's own: low rank by a randomised SVD (Halko et al., arXiv 0909.4061), usable in recipes and in Python.

python examples/own_method.py MODEL --keep 0.5
"""

import argparse
from typing import ClassVar

import torch

import tensorfold
from tensorfold.algebra.solvers.solve import Factors
from tensorfold.hf.sources import find_model
from tensorfold.methods.base import NOTHING, Keep, Method, Positive, largest_bond
from tensorfold.utils.validation import strict


@strict
class Sketch(Method):
    """``W ≈ Q (Qᵀ W)`` with Q an orthonormal basis of ``W (Wᵀ W)^power Ω``, Ω random.

    Args:
        keep: Fraction of the parameters that stays.
        power: Passes over W that sharpen the basis.
        seed: Of Ω.
    """

    name: ClassVar[str] = "sketch"

    keep: Keep
    power: Positive = 2
    seed: int = 0

    def spec(self, out_features: int, in_features: int) -> tensorfold.Spec:
        rank = largest_bond(self.name, self.keep, out_features * in_features, out_features + in_features)
        return tensorfold.Spec.low_rank(out_features, in_features, rank)

    def solve(self, weight, spec, known=NOTHING):
        generator = torch.Generator().manual_seed(self.seed)
        rank, dense = spec.ranks[0], weight.double()  # (out, in)
        basis = torch.linalg.qr(dense @ torch.randn(dense.shape[1], rank, generator=generator).to(dense)).Q
        for _ in range(self.power):
            basis = torch.linalg.qr(dense @ (dense.T @ basis)).Q  # (out, rank)
        cores = (basis, basis.T @ dense)
        return Factors([core.reshape(shape) for core, shape in zip(cores, spec.core_shapes, strict=True)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--keep", type=float, default=0.5)
    given = parser.parse_args()
    recipe = {"fold": [{"targets": "mlp", "method": "sketch", "keep": given.keep}]}
    for name, chosen in {"sketch": recipe, "low-rank": tensorfold.LowRank(keep=given.keep)}.items():
        report = tensorfold.fold(find_model(given.model).model(), chosen)
        errors = list(report.errors.values())
        print(f"{name}: {report.parameters_after:,} parameters, mean error {sum(errors) / len(errors):.4f}")
