"""Confidence intervals: against Student's tables, against draws whose truth is known, and paired by window."""

import json
import math
import random

import pytest

import tensorfold
from tensorfold.errors import InputError
from tensorfold.evaluation.intervals import compare, perplexity_interval, student_quantile
from tensorfold.evaluation.result import WindowScore

TABLE = {3: 3.1824, 7: 2.3646, 30: 2.0423, 239: 1.9699}  # of Student's distribution, two-sided 95 %


@pytest.mark.parametrize("freedom", TABLE)
def test_quantiles_are_those_of_the_tables(freedom):
    assert student_quantile(freedom) == pytest.approx(TABLE[freedom], rel=5e-3)


def windows_of(values, tokens=None):
    tokens = tokens or [100] * len(values)
    return [WindowScore(v * t, t, t / sum(tokens)) for v, t in zip(values, tokens, strict=True)]


def test_equal_windows_have_the_interval_of_a_mean():
    values = [3.0, 3.2, 2.9, 3.5, 3.1]
    mean = sum(values) / 5
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / 4 / 5)
    low, high = perplexity_interval(windows_of(values), mean)
    assert math.log(high) - math.log(low) == pytest.approx(2 * 2.7764 * error, rel=5e-3)
    assert math.sqrt(low * high) == pytest.approx(math.exp(mean))
    assert perplexity_interval(windows_of(values[:3]), mean) is None


def test_it_holds_the_truth_as_often_as_it_says():
    """400 texts of ten windows each, of different lengths, drawn about a known mean."""
    draw, held = random.Random(0), 0
    for _ in range(400):
        tokens = [draw.choice((60, 100, 140)) for _ in range(10)]
        scores = windows_of([draw.gauss(3.0, 0.4) for _ in tokens], tokens)
        low, high = perplexity_interval(scores, sum(s.weight * s.nll / s.tokens for s in scores))
        held += low < math.exp(3.0) < high
    assert 0.92 <= held / 400 <= 0.98


@pytest.fixture(scope="module")
def judged(tiny, tokenizer, prose):
    """Evaluations of a model and of a folded one, by 20 windows."""
    dense, folded = tiny("llama"), tiny("llama")
    tensorfold.fold(folded, tensorfold.LowRank(keep=0.6))
    return [tensorfold.evaluate(model, tokenizer, prose, "disjoint-64", max_tokens=1280) for model in (dense, folded)]


def test_an_evaluation_has_its_interval(judged):
    for each in judged:
        low, high = each.interval
        assert low < each.perplexity < high
        assert len(each.scores) == 20
        stored = json.loads(json.dumps(each.to_dict()))
        assert stored["interval"] == [low, high]
        assert "scores" not in stored
        assert f"{each.perplexity:.2f} [{low:.2f}, {high:.2f}]" in str(each)
        assert type(each)(**stored) == each


def test_pairs_are_far_nearer_than_either(judged):
    dense, folded = judged
    found = compare(folded, dense)
    assert found.ratio == pytest.approx(folded.perplexity / dense.perplexity)
    low, high = found.interval
    assert low < found.ratio < high
    assert high / low - 1 < 0.2 * (dense.interval[1] / dense.interval[0] - 1)
    same = compare(dense, dense)
    assert (same.ratio, same.interval) == (1.0, (1.0, 1.0))


def test_other_windows_are_refused(judged, tiny, tokenizer, prose):
    fewer = tensorfold.evaluate(tiny("llama"), tokenizer, prose, "disjoint-64", max_tokens=640)
    with pytest.raises(InputError, match="needed the same windows"):
        compare(judged[0], fewer)
    other = tensorfold.evaluate(tiny("llama"), tokenizer, prose, "disjoint-32", max_tokens=640)
    with pytest.raises(InputError, match="by one protocol"):
        compare(judged[0], other)


def test_from_the_command_line(command, dense_directory, folded_directory, text_file):
    judge = ("--text", text_file, "--protocol", "disjoint-64", "--max-tokens", "640")
    outcome = command("eval", folded_directory, "--against", dense_directory, *judge, "--json")
    assert outcome.status == 0, outcome.err
    found = json.loads(outcome.out)
    dense = json.loads(command("eval", dense_directory, *judge, "--json").out)
    assert found["against"]["perplexity"] == dense["perplexity"]
    assert found["ratio"] == pytest.approx(found["perplexity"] / dense["perplexity"])
    assert found["ratio_interval"][0] < found["ratio"] < found["ratio_interval"][1]
    assert "paired" in command("eval", folded_directory, "--against", dense_directory, *judge).out
