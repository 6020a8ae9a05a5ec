"""A structure of one's own: block-diagonal, of permuted rows and columns. python examples/own_structure.py MODEL"""

import sys
from dataclasses import dataclass
from typing import ClassVar

import torch

import tensorfold
from tensorfold.algebra.solvers.solve import Factors
from tensorfold.algebra.specs.modes import divisors
from tensorfold.algebra.specs.structure import Structure
from tensorfold.hf.sources import find_model
from tensorfold.methods.base import NOTHING, Keep, Method
from tensorfold.utils.validation import strict


@dataclass(frozen=True)
class BlockDiagonal(Structure):
    """``W[out_order][:, in_order] = diag(B_1 … B_g)``, blocks of shape (m / g, n / g)."""

    kind: ClassVar[str] = "block-diagonal"
    reordered = ("out", "in")
    out_features: int
    in_features: int
    blocks: int

    @property
    def core_shapes(self):
        return ((self.blocks, self.out_features // self.blocks, self.in_features // self.blocks),)

    def apply(self, x, cores):
        return torch.einsum("...gn,gmn->...gm", x.unflatten(-1, (self.blocks, -1)), cores[0]).flatten(-2)


@strict
class BlockDiagonalMethod(Method):
    """Orders by spectral co-clustering of ``|W C^½|`` (Dhillon 2001), then least squares in the inputs' metric C."""

    name: ClassVar[str] = "block-diagonal"
    keep: Keep

    def spec(self, out_features: int, in_features: int) -> BlockDiagonal:
        blocks = [g for g in divisors(out_features) if in_features % g == 0 and g * self.keep >= 1]
        if not blocks:
            raise tensorfold.SpecError(f"{self.name}: no divisor of both {out_features} and {in_features} will do.")
        return BlockDiagonal(out_features, in_features, blocks[0])

    def solve(self, weight, spec, known=NOTHING):
        w, moment = weight.double(), known.metrics().input_moment  # (m, n), and C or None
        moment = torch.eye(w.shape[1]).to(w) if moment is None else moment.to(w)
        left, _, right = torch.linalg.svd((w * moment.diagonal().sqrt()).abs(), full_matrices=False)
        rows, columns = left[:, 1].argsort(), right[1].argsort()
        pairs = zip(rows.chunk(spec.blocks), columns.chunk(spec.blocks), strict=True)
        blocks = [w[r] @ moment[:, c] @ torch.linalg.pinv(moment[c][:, c], hermitian=True) for r, c in pairs]
        return Factors([torch.stack(blocks)], out_order=rows, in_order=columns)


if __name__ == "__main__":
    print(tensorfold.fold(find_model(sys.argv[1]).model(), BlockDiagonalMethod(keep=0.5)))
