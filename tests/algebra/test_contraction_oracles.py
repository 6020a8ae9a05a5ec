"""Contractions against einsum and against opt_einsum, which know nothing of them."""

import math

import numpy as np
import opt_einsum
import pytest
import torch

from tensorfold.algebra.contraction import forms, reference
from tensorfold.algebra.contraction.apply import apply, rows, to_dense
from tensorfold.algebra.contraction.costs import Machine
from tensorfold.algebra.contraction.paths import FORMS, Form, Step, cheapest_order
from tensorfold.algebra.contraction.search import fastest_path
from tensorfold.algebra.specs.spec import Spec

SPECS = {
    "kronecker": Spec.kronecker(12, 8, (4, 2), 3),
    "low-rank": Spec.low_rank(7, 9, 4),
    "chain": Spec.from_modes((2, 3, 4), (3, 1, 2), 5),
    "long-chain": Spec.from_modes((2, 2, 3, 2), (2, 3, 2, 2), 4),
    "padded": Spec.from_modes((3, 4), (2, 3), 3, 11, 5),
}


def random_cores(spec):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in spec.core_shapes]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_matrix_is_one_einsum(spec):
    cores = random_cores(spec)
    matrix = reference.to_dense(cores, spec)
    assert matrix.shape == (spec.out_features, spec.in_features)
    torch.testing.assert_close(to_dense(cores, spec), matrix)
    x = torch.randn(5, spec.in_features, dtype=torch.float64)
    torch.testing.assert_close(apply(x, cores, spec), x @ matrix.T)
    torch.testing.assert_close(rows(torch.arange(spec.out_features), cores, spec), matrix)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_its_equation(form):
    t, left, c, right, d = 5, 4, 1 if form == Form.OUTER else 3, 1 if form in (Form.ROWS, Form.FRONT) else 6, 7
    step = Step(form, 0, None, False, d, c, left, right)
    state, core = torch.randn(t * left * c * right), torch.randn(d, c)
    expected = reference.multiply(state, core, step)
    product = forms.multiply(state, core, step, t)
    torch.testing.assert_close(product.reshape(expected.shape), expected)
    assert forms.seconds(Machine(), step, t) > 0


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_no_order_of_single_sites_is_cheaper_than_ours(spec):
    """opt_einsum counts the multiply–adds of every order that takes a vector through the cores one by one."""
    x = np.empty(spec.in_modes)
    cores = [np.empty(shape) for shape in spec.core_shapes]
    bonds, in_axes, out_axes = "abcdef", "uvwxyz", "mnopqr"
    terms = [f"{bonds[k]}{out_axes[k]}{in_axes[k]}{bonds[k + 1]}" for k in range(spec.sites)]
    equation = f"{in_axes[: spec.sites]},{','.join(terms)}->{out_axes[: spec.sites]}"
    counts = {}
    for start in range(spec.sites):
        for moves in range(2 ** (spec.sites - 1)):
            order, first, last = [start], start, start
            for k in range(spec.sites - 1):
                first, last = (first - 1, last) if moves >> k & 1 else (first, last + 1)
                order.append(first if moves >> k & 1 else last)
            if min(order) < 0 or max(order) >= spec.sites:
                continue
            # Positions in opt_einsum's list: the state is put at its end, the vector begins at its front.
            left, path = ["x", *range(spec.sites)], []
            state = "x"
            for site in order:
                pair = tuple(sorted((left.index(state), left.index(site))))
                left = [item for k, item in enumerate(left) if k not in pair] + ["state"]
                path.append(pair)
                state = "state"
            _, info = opt_einsum.contract_path(equation, x, *cores, optimize=path)
            products = (step[2] for step in info.contraction_list)  # such as "bc,ab->ac"
            products = [set(step[2]) - set(",->") for step in info.contraction_list]  # of "bc,ab->ac", say
            counts[tuple(order)] = sum(math.prod(info.size_dict[axis] for axis in axes) for axes in products)
    ours = cheapest_order(spec.out_modes, spec.in_modes, spec.ranks)
    visited, first, last = [ours.start], ours.start, ours.start
    for move in ours.moves:
        first, last = (first - 1, last) if move == "L" else (first, last + 1)
        visited.append(first if move == "L" else last)
    assert counts[tuple(visited)] == min(counts.values())
    assert fastest_path(spec, 1, force="chain").macs == ours.macs
