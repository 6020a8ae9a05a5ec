"""The map of what was chosen: a cell a matrix, with its share and the reason."""

import json

import pytest

pytest.importorskip("plotly")
pytest.importorskip("jinja2")

import tensorfold
from browser import Page
from tensorfold import Auto, LowRank, Recipe, Rule, write_report
from tensorfold.hf.loading import save
from tensorfold.report.chosen import chosen_map
from tensorfold.report.facts import read_directory
from tensorfold.utils.records import CARD


def folded(model, rules, tokenizer, prose, out):
    report = tensorfold.fold(model, Recipe(rules), tokenizer, [prose], calibration_tokens=256)
    save(model, tokenizer, out, report.to_dict())
    return report, chosen_map(read_directory(out, "model"))


def cell(found, block, column):
    return dict(found.rows)[block][found.columns.index(column)]


def test_a_search_gives_every_matrix_a_share_and_a_reason(tiny, tokenizer, prose, tmp_path):
    report, found = folded(tiny("llama"), (Rule("all-linear", Auto(keep=0.5)),), tokenizer, prose, tmp_path / "m")
    assert {name for name, _ in found.rows} == {0, 1}
    for name, choice in report.choices.items():
        block, column = int(name.split(".")[2]), name.split(".", 3)[3]
        each = cell(found, block, column)
        dense = tiny("llama").get_submodule(name).weight.numel()
        assert each.kept == f"{100 * choice.parameters / dense:.0f}"
        if choice.dense:
            assert "stays as it is" in each.reason
        else:
            assert f"{choice.parameters:,} of {dense:,} parameters stay, as {report.modules[name]}." in each.reason
            assert f"Measured error {report.errors[name]:.3f}" in each.reason
        assert "Errors of the search" in each.reason
    tints = [each.tint for _, line in found.rows for each in line]
    assert (min(tints), max(tints)) == (0.0, 1.0)


def test_a_plain_model_shows_the_units_that_are_left(tiny, tokenizer, prose, tmp_path):
    _, found = folded(tiny("llama"), (Rule("mlp", Auto(keep=0.6, plain=True)),), tokenizer, prose, tmp_path / "m")
    kept = tensorfold.load(tmp_path / "m").config.intermediate_size
    assert found.columns == ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert f"as {kept}×32 of 48×32" in cell(found, 1, "mlp.up_proj").reason
    model = read_directory(tmp_path / "m", "model")
    assert model.is_folded
    card = tmp_path / "m" / CARD
    damaged = json.loads(card.read_text())
    damaged["modules"]["model.layers.0.mlp.up_proj"]["out_modes"] = "many"
    card.write_text(json.dumps(damaged))
    assert read_directory(tmp_path / "m", "model").modules == {}


def test_the_experts_of_a_tensor_share_a_cell(tiny, tokenizer, prose, tmp_path):
    _, found = folded(tiny("qwen3_moe"), (Rule("experts", LowRank(keep=0.5)),), tokenizer, prose, tmp_path / "m")
    each = cell(found, 0, "mlp.experts.gate_up_proj")
    assert "experts; " in each.reason
    assert "(number 0)" in each.reason
    assert "Mean error" in each.reason


def test_what_a_recipe_asks_for_has_one_shade(tiny, tokenizer, prose, tmp_path):
    rules = (Rule("mlp", LowRank(keep=0.5)), Rule("embedding", LowRank(keep=0.5)))
    _, found = folded(tiny("llama"), rules, tokenizer, prose, tmp_path / "m")
    assert "The recipe asks for it." in cell(found, 0, "mlp.up_proj").reason
    assert found.outside[0].startswith("model.embed_tokens: ")
    write_report([tmp_path / "m"], tmp_path / "report.html", prompt=None)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Outside the blocks, model.embed_tokens:" in page.text
    buttons = [values for tag, values in page.elements if tag == "button" and "title" in values]
    assert len(buttons) == 6
    assert [button["tabindex"] for button in buttons] == ["0", *["-1"] * 5]
    assert all(button["title"] in button["aria-label"] for button in buttons)


def test_a_dense_model_has_no_map(dense_directory):
    assert chosen_map(read_directory(dense_directory, "dense")) is None
