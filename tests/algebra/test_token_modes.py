"""Default modes of token-mps: those that keep most at the size asked for, without padding where a width has factors."""

import itertools
import math

import pytest
import torch
from transformers import LlamaConfig

import tensorfold
from tensorfold import Recipe, Rule, SpecError, TokenMPS
from tensorfold.algebra.solvers.token_mps import token_mps_svd
from tensorfold.algebra.specs.modes import powers_of_two
from tensorfold.algebra.specs.token_modes import modes_of_rank, modes_within
from tensorfold.algebra.specs.token_mps import TokenMPSSpec, rows

# Rivals of the same width, by hand.
RIVALS = {
    576: [(2,) * 6 + (3, 3), (4, 4, 4, 9), (8, 8, 9), (24, 24), (6, 96), (3, 12, 16), (12, 6, 8), (2,) * 10],
    768: [(2,) * 8 + (3,), (4, 4, 4, 12), (8, 8, 12), (24, 32), (6, 128), (4, 8, 24), (3, 16, 16), (2,) * 10],
    1024: [(2,) * 10, (4,) * 5, (8, 8, 16), (32, 32), (8, 128), (4, 16, 16), (16, 4, 16)],
}


def kept(spec):
    """Part of the energy of random rows that their chains keep."""
    table = torch.randn(40, spec.width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spec = TokenMPSSpec(40, spec.width, spec.modes, spec.rank)
    left = table - rows(token_mps_svd(table, spec), spec.split)[:, : spec.width]
    return 1 - float(left.square().sum() / table.square().sum())


@pytest.mark.parametrize("width", RIVALS)
@pytest.mark.parametrize("keep", [0.05, 0.1, 0.2, 0.3, 0.5, 0.75])
def test_a_budget_gets_the_modes_that_keep_most(width, keep):
    spec = TokenMPS(keep=keep).spec(1000, width)
    assert spec.padded_width == width
    assert spec.parameters <= keep * spec.dense_parameters
    for modes in RIVALS[width]:
        try:
            rival = TokenMPSSpec.within(1000, width, modes, keep)
        except SpecError:
            continue
        assert kept(spec) > kept(rival) - 0.006, modes


@pytest.mark.parametrize("width", RIVALS)
@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_a_rank_gets_no_more_numbers_than_the_finest_chain_has_and_keeps_more(width, rank):
    spec = TokenMPS(rank=rank).spec(1000, width)
    finest = TokenMPSSpec(1000, width, RIVALS[width][0], rank)
    assert (spec.rank, spec.padded_width) == (rank, width)
    assert spec.parameters <= finest.parameters
    assert kept(spec) > kept(finest)


def test_the_width_of_smollm2_is_not_padded():
    """Twos up to 1024 took 232 numbers a token, and kept less than half of what 192 do."""
    padded = TokenMPSSpec(49152, 576, powers_of_two(576), 4)
    spec = TokenMPS(rank=4).spec(49152, 576)
    assert (padded.parameters_per_token, spec.parameters_per_token, spec.modes) == (232, 192, (24, 24))
    assert kept(spec) > 1.5 * kept(padded)
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(hidden_size=576, num_hidden_layers=1, vocab_size=300, **heads)
    plan = tensorfold.plan(config, Recipe((Rule("embedding", TokenMPS(rank=4)),)))
    assert plan.modules["model.embed_tokens"].modes == (24, 24)


@pytest.mark.parametrize("width", [13, 26, 63, 71, 94, 514, 1021])
def test_awkward_widths_are_padded_a_little_at_most(width):
    """Up to the next number of small factors, where its own factors are large primes."""
    smooth = next(n for n in itertools.count(width) if all(n % p for p in range(11, n + 1) if is_prime(p)))
    for rank in (1, 2):
        spec = TokenMPS(rank=rank).spec(10, width)
        assert spec.padded_width in (width, smooth)
        assert rank > 1 or spec.parameters_per_token < width
    for keep in (0.5, 0.9):
        if width > 30:
            assert TokenMPS(keep=keep).spec(10, width).padded_width in (width, smooth)


def is_prime(number):
    return all(number % factor for factor in range(2, math.isqrt(number) + 1))


def test_ranks_that_only_a_padded_width_has_are_kept():
    spec = TokenMPS(rank=30).spec(10, 576)
    assert (spec.rank, spec.modes) == (30, (2,) * 10)
    with pytest.raises(SpecError, match=r"rank=40 is more than any bond.*largest attainable is 32"):
        TokenMPS(rank=40).spec(10, 576)


def test_a_budget_below_every_chain_names_what_is_possible():
    with pytest.raises(SpecError, match=r"rank 1 with modes .* already takes 18; keep at least 0\.0313"):
        TokenMPS(keep=0.02).spec(10, 576)
    assert TokenMPS(keep=0.0313).spec(10, 576).parameters_per_token == 18


def test_equal_arguments_give_equal_modes():
    first = modes_of_rank(960, 3), modes_within(960, 0.4)
    modes_of_rank.cache_clear()
    modes_within.cache_clear()
    assert (modes_of_rank(960, 3), modes_within(960, 0.4)) == first
