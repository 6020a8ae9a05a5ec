"""What text says of a matrix, as metrics, written out."""

import torch

from tensorfold.algebra.statistics import Metrics, Statistics


def moment(size, seed):
    root = torch.randn(20, size, generator=torch.Generator().manual_seed(seed))
    return root.T @ root / 20


def test_linear_layers_are_fitted_in_both_moments():
    known = Statistics(input_moment=moment(4, 0), gradient_moment=moment(3, 1))
    assert known.metrics() == (known.input_moment, known.gradient_moment)
    assert not Statistics().known
    assert known.known


def test_tables_weigh_rows_and_add_both_ends():
    counts = torch.tensor([7, 0, 2])
    known = Statistics(moment(4, 0), moment(4, 1), counts)
    inputs, weights = known.metrics(exponent=0.5)
    roots = torch.tensor([8.0, 1.0, 3.0], dtype=torch.float64).sqrt()
    torch.testing.assert_close(weights, roots / roots.mean())
    torch.testing.assert_close(inputs, known.input_moment.double() + known.gradient_moment.double())
    torch.testing.assert_close(known.shares, torch.tensor([8, 1, 3], dtype=torch.float64) / 12)
    untied = Statistics(gradient_moment=known.gradient_moment, counts=counts).metrics()
    torch.testing.assert_close(untied.input_moment, known.gradient_moment.double())


def test_metrics_follow_the_order():
    weight, rows, columns = torch.randn(3, 4), torch.tensor([2, 0, 1]), torch.tensor([1, 3, 0, 2])
    inputs, outputs = moment(4, 0), moment(3, 1)
    for given in (outputs, outputs.diagonal()):
        moved = Metrics(inputs, given).reordered(rows, columns)
        left, right = (torch.diag(g) if g.dim() == 1 else g for g in (given, moved.gradient_moment))
        there = weight[rows][:, columns]
        before, after = (
            (g @ w @ c * w).sum() for g, w, c in ((left, weight, inputs), (right, there, moved.input_moment))
        )
        torch.testing.assert_close(before, after)
