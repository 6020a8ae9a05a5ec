"""One way in to every solver: dense weight and spec to cores, in the plain metric or in those of inputs and outputs."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tensorfold.algebra.solvers.als import check_gradient_moment, check_input_moment, is_large_table, weighted_als
from tensorfold.algebra.solvers.als_cg import weigh
from tensorfold.algebra.solvers.low_rank import restricted, whitened_low_rank
from tensorfold.algebra.solvers.pivots import with_pivots, with_pivots_in_basis
from tensorfold.algebra.solvers.shared_basis import fit_shared_basis
from tensorfold.algebra.solvers.ttsvd import check_weight, tt_svd
from tensorfold.algebra.specs.spec import Spec
from tensorfold.algebra.statistics import Metrics
from tensorfold.errors import SpecError

_CHUNK = 2**21  # elements worked on at a time in fp64
_TABLE_SWEEPS = 3  # of large tables: each costs a hundred passes over the table


class Factors(NamedTuple):
    """What a solver returns.

    Attributes:
        cores: Shapes ``spec.core_shapes``.
        scalars: Shape (terms,), where the spec has scalars; 1 if None.
        out_order, in_order: int64 index orders for the sides in ``spec.reordered``:
            ``weight[out_order][:, in_order]`` is what the cores approximate.
    """

    cores: list[Tensor]
    scalars: Tensor | None = None
    out_order: Tensor | None = None
    in_order: Tensor | None = None


def factorize(
    weight: Tensor,
    spec: Spec,
    input_moment: Tensor | None = None,
    start: list[Tensor] | None = None,
    gradient_moment: Tensor | None = None,
) -> Factors:
    """What a layer of ``spec`` is made of: :func:`fit`, of the rows and columns that it keeps, with its pivots.

    A partial spec keeps those of the largest norms in the metrics, which is a greedy choice; what is kept makes up for
    the rest by regression, and is then fitted.

    Arguments and errors are those of :func:`fit`.
    """
    if spec.is_partial:
        check_weight(weight, spec)
        _check_moments(spec, input_moment, gradient_moment)
        kept, rows, columns = restricted(weight, spec, input_moment, gradient_moment)
        metrics = Metrics(input_moment, gradient_moment).reordered(rows, columns)
        found = factorize(kept, spec.inner, metrics.input_moment, None, metrics.gradient_moment)
        return found._replace(out_order=rows if found.out_order is None else rows[found.out_order], in_order=columns)
    cores = fit(weight, spec, input_moment, start, gradient_moment)
    if spec.has_pivot_rows:
        cores, order = with_pivots(cores)
        return Factors(cores, out_order=order)
    if spec.pivoted:
        cores, order = with_pivots_in_basis(cores, spec)
        return Factors(cores, in_order=order) if spec.grouped == "in" else Factors(cores, out_order=order)
    return Factors(cores)


def fit(
    weight: Tensor,
    spec: Spec,
    input_moment: Tensor | None = None,
    start: list[Tensor] | None = None,
    gradient_moment: Tensor | None = None,
) -> list[Tensor]:
    """Cores of ``spec`` that approximate ``weight``.

    Without a metric: TT-SVD, in the Frobenius norm nearest for two sites, and within √(L−1) of that for L. With the
    second moment C of the inputs: smallest ``‖(W − Ŵ) C^½‖``, the mean squared error of the layer's output. With that
    of the loss's gradient at the outputs as well, G: smallest ``‖G^½ (W − Ŵ) C^½‖``, the loss's second-order change
    where inputs and gradients are independent (Kronecker-factored Fisher; Martens & Grosse, arXiv 1503.05671). Exact
    for low rank without ``start``; by weighted alternating least squares, started from the TT-SVD, for every other
    shape, and so a local optimum; those of groups with pivots are :mod:`.shared_basis`'s.

    Args:
        weight: Shape (out_features, in_features), any floating dtype.
        input_moment: C, shape (in_features, in_features), symmetric and positive semidefinite; may be singular.
        start: Cores that weighted alternating least squares starts from, instead of the TT-SVD.
        gradient_moment: G, shape (out_features, out_features), or (out_features,), the weight of every row.

    Returns:
        Cores of shapes ``spec.core_shapes``, fp32 or ``weight``'s dtype if that is fp64.

    Raises:
        SpecError: A shape does not fit, or weight or metric hold NaN or infinity; or the spec leaves rows or columns
            out, which :func:`factorize` chooses.
    """
    check_weight(weight, spec)
    if spec.is_partial:
        raise SpecError(
            f"fit: {spec} leaves rows or columns out; factorize() chooses which, or fit spec.inner to those."
        )
    if spec.sites == 1 or (input_moment is None and gradient_moment is None):
        return tt_svd(weight, spec)
    _check_moments(spec, input_moment, gradient_moment)
    if spec.is_low_rank and not spec.is_padded and start is None:
        return whitened_low_rank(weight, input_moment, spec, gradient_moment)
    if spec.pivoted and spec.grouped:
        return fit_shared_basis(weight, spec, input_moment, gradient_moment, start).cores
    sweeps = _TABLE_SWEEPS if is_large_table(weight, gradient_moment) else 20
    return weighted_als(weight, spec, start or tt_svd(weight, spec), input_moment, gradient_moment, sweeps=sweeps).cores


def _check_moments(spec: Spec, input_moment: Tensor | None, gradient_moment: Tensor | None) -> None:
    if input_moment is not None:
        check_input_moment(input_moment, spec)
    if gradient_moment is not None:
        check_gradient_moment(gradient_moment, spec)


def relative_error(
    weight: Tensor, approximation: Tensor, input_moment: Tensor | None = None, gradient_moment: Tensor | None = None
) -> float:
    """``‖G^½ (W − Ŵ) C^½‖ / ‖G^½ W C^½‖`` over the real rows and columns; metrics that are not given are the identity.

    A weight of norm zero is matched exactly or not at all: 0.0 or infinity.
    """
    above = below = 0.0
    # In chunks of rows: four fp64 copies of an embedding table would dwarf the model.
    whole = gradient_moment is not None and gradient_moment.dim() == 2
    chunk = len(weight) if whole else max(1, _CHUNK // weight.shape[1])
    for first in range(0, len(weight), chunk):
        rows = slice(first, first + chunk)
        weights = gradient_moment if gradient_moment is None or whole else gradient_moment[rows]
        w = weight[rows].double()
        above += _squared_norm(w - approximation[rows].double(), input_moment, weights)
        below += _squared_norm(w, input_moment, weights)
    if below == 0.0:
        return 0.0 if above == 0.0 else float("inf")
    return (above / below) ** 0.5


def norm_ratio(
    weight: Tensor, approximation: Tensor, input_moment: Tensor | None = None, gradient_moment: Tensor | None = None
) -> float:
    """Krony-PT's ``α = ‖G^½ W C^½‖ / ‖G^½ Ŵ C^½‖``, by which a shrunken fit regains its norm; 1 for a zero one."""
    norm = _squared_norm(approximation.double(), input_moment, gradient_moment)
    return (_squared_norm(weight.double(), input_moment, gradient_moment) / norm) ** 0.5 if norm else 1.0


def _squared_norm(matrix: Tensor, input_moment: Tensor | None, gradient_moment: Tensor | None) -> float:
    weighted = weigh(
        matrix,
        None if input_moment is None else input_moment.to(matrix),
        None if gradient_moment is None else gradient_moment.to(matrix),
    )
    return max(0.0, float((weighted * matrix).sum()))
