"""One way in to every solver: from a dense weight and a spec to cores, with the least ``‖G^½ (W − Ŵ) C^½‖_F``.

Notation:
    W, Ŵ        dense matrix and its approximation, (out, in)
    C           input moment, second moment of the layer's inputs, (in, in); the identity if not given
    G           gradient moment, second moment of the loss's gradient at the layer's outputs, (out, out), or (out,) for
                a diagonal one, the weight of every row; the identity if not given
"""

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
_TABLE_SWEEPS = 3  # sweeps over large tables, each of which costs a hundred passes over the table


class Factors(NamedTuple):
    """Solution of a fit: cores, and the index orders in which they hold.

    Attributes:
        cores: Shapes ``spec.core_shapes``.
        scalars: Shape (terms,), where the spec has scalars; 1 if None.
        out_order: Row of the weight at each place, int64, where ``"out"`` is in ``spec.reordered``.
        in_order: Column of the weight at each place, int64, where ``"in"`` is in ``spec.reordered``. The cores
            approximate ``weight[out_order][:, in_order]``.
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
    """Fit any spec: choose the rows and columns of a partial one, fit cores to them, and bring in pivots.

    A partial spec keeps the rows and columns with the largest weighted norms, a greedy choice; what is kept makes up
    for the rest by regression (:func:`.low_rank.restricted`), and is then fitted.

    Args:
        weight: W, shape (out_features, in_features), any floating dtype.
        spec: Shape of the layer.
        input_moment: C, shape (in_features, in_features), symmetric positive semidefinite; may be singular.
        start: Cores that an iterative solver starts from, instead of the TT-SVD; not used by a partial spec.
        gradient_moment: G, shape (out_features, out_features), or (out_features,), the weight of every row.

    Raises:
        SpecError: A shape does not fit, or weight or moments hold NaN or infinity.
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
    """Approximate a matrix by the cores of a spec that keeps all its rows and columns.

    Without moments: TT-SVD, nearest in the Frobenius norm for two sites, and within √(L−1) of that for L. With C: least
    ``‖(W − Ŵ) C^½‖²``, the mean squared error of the layer's output. With G as well: least ``‖G^½ (W − Ŵ) C^½‖²``, the
    loss's second-order change where inputs and gradients are independent (Kronecker-factored Fisher; Martens & Grosse,
    arXiv 1503.05671). Low rank without ``start`` has a closed form (:mod:`.low_rank`). Every other shape is solved by
    alternating least squares from the TT-SVD (:mod:`.als`; with pivots in groups, :mod:`.shared_basis`), and so to a
    local optimum.

    Args:
        weight: W, shape (out_features, in_features), any floating dtype.
        spec: Shape of the cores.
        input_moment: C, shape (in_features, in_features), symmetric positive semidefinite; may be singular.
        start: Cores that an iterative solver starts from, instead of the TT-SVD.
        gradient_moment: G, shape (out_features, out_features), or (out_features,), the weight of every row.

    Returns:
        Cores of shapes ``spec.core_shapes``, fp32 or ``weight``'s dtype if that is fp64.

    Raises:
        SpecError: A shape does not fit, or weight or moments hold NaN or infinity; or the spec leaves rows or columns
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
    """Relative error ``‖G^½ (W − Ŵ) C^½‖ / ‖G^½ W C^½‖``, summed in fp64.

    Args:
        weight: W, (out, in).
        approximation: Ŵ, (out, in).
        input_moment: C, (in, in); the identity if None.
        gradient_moment: G, (out, out) or (out,); the identity if None.

    Returns:
        The error; where W has norm zero, 0.0 for an exact match and infinity otherwise.
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
    """Factor ``α = ‖G^½ W C^½‖ / ‖G^½ Ŵ C^½‖`` that gives a shrunken fit the norm of W (Krony-PT); 1 if Ŵ is zero.

    Args:
        weight: W, (out, in).
        approximation: Ŵ, (out, in).
        input_moment: C, (in, in); the identity if None.
        gradient_moment: G, (out, out) or (out,); the identity if None.
    """
    norm = _squared_norm(approximation.double(), input_moment, gradient_moment)
    return (_squared_norm(weight.double(), input_moment, gradient_moment) / norm) ** 0.5 if norm else 1.0


def _squared_norm(matrix: Tensor, input_moment: Tensor | None, gradient_moment: Tensor | None) -> float:
    """Weighted norm ``‖G^½ M C^½‖²`` of a matrix M (out, in)."""
    weighted = weigh(
        matrix,
        None if input_moment is None else input_moment.to(matrix),
        None if gradient_moment is None else gradient_moment.to(matrix),
    )
    return max(0.0, float((weighted * matrix).sum()))
