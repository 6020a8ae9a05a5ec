"""The demo's own steps, on a tiny model in place of the real one."""

import dataclasses

import tensorfold
from tensorfold.cli import demo


def test_the_demo(command, monkeypatch, workplace, dense_directory):
    """A table, sentences and the report's place are printed, the result loads, and a second demo has nothing to do."""
    asked = demo.order()
    assert asked.engine == "openvino" or not asked.bits
    tiny = dataclasses.replace(
        asked, model=str(dense_directory), engine="transformers", size=0.9, tokens=600, judged=256
    )
    monkeypatch.setattr(demo, "order", lambda: tiny)
    for expected in (0, 9):
        outcome = command("demo", "--out", "shown")
        assert outcome.status == 0, outcome.err
        assert outcome.err.count("done before") == expected
    folded = tensorfold.load(workplace / "shown" / "folded")
    assert folded.num_parameters() < tensorfold.load(dense_directory).num_parameters()
    assert folded.config.quantization_config.modules  # factors, and no narrower MLPs
    for words in ("python-docs (unseen)", "dense: The most", "folded: The most", "The report is shown/report.html."):
        assert words in outcome.out


def test_the_demo_takes_no_directory_of_something_else(refused, workplace, dense_directory, monkeypatch):
    asked = dataclasses.replace(demo.order(), model=str(dense_directory))
    monkeypatch.setattr(demo, "order", lambda: asked)
    (workplace / "shown").mkdir()
    (workplace / "shown" / "file").touch()
    refused("demo", "--out", "shown", says=["already exists"])
