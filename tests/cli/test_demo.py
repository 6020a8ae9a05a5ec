"""The demo's own steps, on a tiny model in place of the real one."""

import dataclasses

import tensorfold
from tensorfold import Recipe
from tensorfold.cli import demo


def test_the_demo(command, monkeypatch, workplace, dense_directory):
    """Sizes, perplexities and sentences are printed, the directory loads, and a second demo takes its place."""
    shipped = Recipe.load("demo")
    tiny = dataclasses.replace(
        shipped,
        model=str(dense_directory),
        calibrate=dataclasses.replace(shipped.calibrate, tokens=300),
        eval=dataclasses.replace(shipped.eval, protocol="disjoint-64"),
    )
    monkeypatch.setattr(demo.Recipe, "load", lambda _: tiny)
    monkeypatch.setattr(demo, "MAX_TOKENS", 256)
    monkeypatch.setenv("COLUMNS", "200")
    for _ in range(2):
        outcome = command("demo", "--out", "shown")
        assert outcome.status == 0, outcome.err
    folded = tensorfold.load(workplace / "shown").num_parameters()
    assert f"{tensorfold.load(dense_directory).num_parameters():,}" in outcome.out
    assert f"{folded:,}" in outcome.out
    judged = "perplexity (disjoint-64, python-docs (test), 252 tokens)"
    for words in (judged, "next-token accuracy", "folded: The most"):
        assert words in " ".join(outcome.out.split())
