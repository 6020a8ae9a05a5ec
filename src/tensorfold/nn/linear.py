"""A linear layer whose weight is a matrix product operator."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from tensorfold.algebra.contract import apply, cheapest_order, to_dense
from tensorfold.algebra.solve import fit
from tensorfold.algebra.spec import Spec


class MPOModule(nn.Module):
    """Cores of one spec, and the bond scalars where the spec has them: what linear layer and embedding share."""

    def __init__(self, spec: Spec, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.cores = nn.ParameterList(
            nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for shape in spec.core_shapes
        )
        self.scalars: nn.Parameter | None = None
        if spec.scalars:
            self.scalars = nn.Parameter(torch.empty(spec.ranks[0], device=device, dtype=dtype))

    def reset_parameters(self, std: float) -> None:
        """Random cores whose product has entries of standard deviation ``std``, for any number of sites.

        An entry of the matrix sums ``Π r`` paths of L independent factors, so each core gets
        ``σ = (std² / Π r)^(1/2L)``.
        """
        variance = std**2 / math.prod(self.spec.ranks)
        for core in self.cores:
            nn.init.normal_(core, std=variance ** (1 / (2 * self.spec.sites)))
        if self.scalars is not None:
            nn.init.ones_(self.scalars)

    def factors(self) -> list[Tensor]:
        """The cores with the bond scalars absorbed in the smaller factor, shapes ``spec.core_shapes``."""
        cores = list(self.cores)
        if self.scalars is None:
            return cores
        if cores[0].numel() <= cores[1].numel():
            return [cores[0] * self.scalars, cores[1]]
        return [cores[0], self.scalars.reshape(-1, 1, 1, 1) * cores[1]]

    def to_dense(self) -> Tensor:
        """The matrix, shape (out_features, in_features)."""
        return to_dense(self.factors(), self.spec)

    @torch.no_grad()
    def load_cores(self, cores: list[Tensor], scalars: Tensor | None = None) -> None:
        """Copy solver output into the parameters; scalars default to 1."""
        for parameter, core in zip(self.cores, cores, strict=True):
            parameter.copy_(core)
        if self.scalars is not None:
            self.scalars.copy_(torch.ones_like(self.scalars) if scalars is None else scalars)


class MPOLinear(MPOModule):
    """``y = x Wᵀ + b`` with W an MPO, contracted site by site and never built.

    ``spec.parameters`` numbers and ``spec.macs`` multiply–adds a token (plus the bias). Kronecker products, their sums,
    low rank and tensor-train layers (Novikov et al., arXiv 1509.06569) are all this module with different specs.

    Args:
        spec: Modes and bonds. Only shapes are needed, so the module can be built on the meta device.
        bias: Whether there is a bias of shape (out_features,).
    """

    def __init__(self, spec: Spec, bias: bool = True, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(spec, device, dtype)
        self.in_features, self.out_features = spec.in_features, spec.out_features
        self.order = cheapest_order(spec)
        self.bias = nn.Parameter(torch.empty(spec.out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None) -> None:
        """Random cores; by default the output variance of a freshly made ``nn.Linear``, whose weights have 1/(3·in)."""
        super().reset_parameters((3 * self.in_features) ** -0.5 if std is None else std)
        if self.bias is not None:
            bound = self.in_features**-0.5
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_dense(cls, weight: Tensor, spec: Spec, bias: Tensor | None = None, metric: Tensor | None = None) -> Self:
        """The closest MPO to ``weight``, in the metric of the layer's inputs where one is given (see ``solve.fit``).

        Args:
            weight: Shape (out_features, in_features).
            bias: Shape (out_features,), kept exactly; None stays none.
            metric: Second moment of the inputs, shape (in_features, in_features).

        Raises:
            SpecError: A shape does not fit ``spec``, or a value is not finite.
        """
        return cls.from_cores(fit(weight.detach(), spec, metric), spec, weight, bias)

    @classmethod
    def from_cores(
        cls,
        cores: list[Tensor],
        spec: Spec,
        like: Tensor,
        bias: Tensor | None = None,
        scalars: Tensor | None = None,
    ) -> Self:
        """A layer holding the given cores, on the device and in the dtype of ``like``."""
        layer = cls(spec, bias is not None, device="meta").to_empty(device=like.device).to(like.dtype)
        layer.load_cores(cores, scalars)
        if layer.bias is not None and bias is not None:
            with torch.no_grad():
                layer.bias.copy_(bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(..., in_features)`` → ``(..., out_features)``."""
        return apply(x, self.factors(), self.spec, self.bias, self.order)

    def extra_repr(self) -> str:
        return f"{self.spec}, in={self.in_features}, out={self.out_features}, bias={self.bias is not None}"
