"""``plain: true``: equally many hidden units dropped in every MLP, and a model that transformers alone can load."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import tensorfold
from tensorfold import Auto, InputError, Recipe, Rule, SpecError
from tensorfold.cli.main import run
from tensorfold.export.hub import hub_card
from tensorfold.models.anatomy import matrices
from tensorfold.nn import FoldedModule

TEXT = {"calibration_tokens": 1024}
ARCHITECTURES = ["llama", "gpt2", "qwen2", "opt", "gpt_neox", "phi", "gemma3", "mistral"]


def logits(model):
    with torch.no_grad():
        return model(torch.arange(20, 52).reshape(2, 16)).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_alone_loads_it(tiny, tokenizer, prose, architecture, tmp_path):
    model = tiny(architecture)
    whole = max(m.in_features for m in matrices(model).values() if m.group == "mlp")
    report = tensorfold.fold(model, Auto(keep=0.75, plain=True), tokenizer, [prose], **TEXT)
    assert not any(isinstance(module, FoldedModule) for module in model.modules())
    assert getattr(model.config, "quantization_config", None) is None
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    assert report.bytes_after == 4 * report.parameters_after
    assert report.plan.kept <= 0.75
    assert {max(choice.rows, choice.columns) for choice in report.choices.values()} == {whole * 3 // 4}
    model.save_pretrained(tmp_path / "out")
    text = (tmp_path / "out" / "config.json").read_text()
    assert "tensorfold" not in text
    assert f": {whole * 3 // 4}" in text
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_it_is_what_the_folded_layers_were(tiny, tokenizer, prose, architecture, monkeypatch):
    plain, folded = tiny(architecture), tiny(architecture)
    tensorfold.fold(plain, Auto(keep=0.6, plain=True), tokenizer, [prose], **TEXT)
    monkeypatch.setattr("tensorfold.folding.in_memory.narrow", lambda *_: False)
    with pytest.warns(UserWarning, match="no setting for the number of hidden units"):
        tensorfold.fold(folded, Auto(keep=0.6, plain=True), tokenizer, [prose], **TEXT)
    assert any(isinstance(module, FoldedModule) for module in folded.modules())
    torch.testing.assert_close(logits(plain), logits(folded), rtol=1e-4, atol=1e-5)


def test_what_other_rules_fold_is_named_as_the_reason(tiny, tokenizer, prose):
    recipe = Recipe((Rule("mlp", Auto(keep=0.6, plain=True)), Rule(["q_proj"], tensorfold.LowRank(keep=0.5))))
    model = tiny("llama")
    with pytest.warns(UserWarning, match=r"2 matrices are folded besides, such as model\.layers\.0\.self_attn\.q_proj"):
        tensorfold.fold(model, recipe, tokenizer, [prose], **TEXT)
    assert any(isinstance(module, FoldedModule) for module in model.modules())


def test_attention_among_the_targets_stays_dense(tiny, tokenizer, prose):
    model, dense = tiny("llama"), tiny("llama")
    recipe = Recipe((Rule("all-linear", Auto(keep=0.8, plain=True)),))
    report = tensorfold.fold(model, recipe, tokenizer, [prose], **TEXT)
    assert report.plan.kept <= 0.8
    for ours, theirs in zip(model.model.layers, dense.model.layers, strict=True):
        assert torch.equal(ours.self_attn.q_proj.weight, theirs.self_attn.q_proj.weight)
    assert model.config.intermediate_size < dense.config.intermediate_size


def test_it_is_nearer_than_every_other_unit(tiny, tokenizer, prose):
    """Krony-PT's pruned start keeps every second unit as it is."""
    dense = tiny("llama")
    pruned = copy.deepcopy(dense)
    for block in pruned.model.layers:
        block.mlp.down_proj.weight.data[:, 1::2] = 0
    model = copy.deepcopy(dense)
    tensorfold.fold(model, Auto(keep=0.5, plain=True), tokenizer, [prose], **TEXT)
    ids = torch.tensor(tokenizer(prose)["input_ids"][:256]).reshape(2, 128)
    with torch.no_grad():
        ours, theirs = (float((each(ids).logits - dense(ids).logits).norm()) for each in (model, pruned))
    assert ours < 0.7 * theirs


def test_what_it_cannot_do_is_said(tiny, tokenizer, prose):
    with pytest.raises(InputError, match="plain"):
        tensorfold.fold(tiny("llama"), Auto(keep=0.5, plain=True))
    with pytest.raises(InputError, match=r"plain.*effort: medium or high"):
        tensorfold.fold(tiny("llama"), Auto(keep=0.5, plain=True, effort="low"), tokenizer, [prose], **TEXT)
    recipe = Recipe((Rule("all-linear", Auto(keep=0.1, plain=True)),))
    with pytest.raises(SpecError, match=r"keep more than 0\.\d+, or target the MLP alone"):
        tensorfold.fold(tiny("llama"), recipe, tokenizer, [prose], **TEXT)


@pytest.mark.parametrize("given", ["recipe", "option"])
def test_from_the_command_line(dense_directory, text_file, tmp_path, capsys, given):
    recipe = tmp_path / "plain.yaml"
    recipe.write_text("fold:\n- {targets: mlp, method: auto, keep: 0.5, plain: true}\n")
    options = {"recipe": ["--recipe", recipe], "option": ["--keep", "0.5", "--plain"]}[given]
    arguments = ["fold", dense_directory, *options, "--calibrate", text_file, "--tokens", "600"]
    with pytest.raises(SystemExit) as stopped:
        run([str(each) for each in [*arguments, "--out", tmp_path / "out", "--json"]])
    assert not stopped.value.code
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.intermediate_size == 24
    assert torch.equal(logits(tensorfold.load(tmp_path / "out")), logits(model))
    readme = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "import tensorfold" not in readme
    scope = {"PATH": tmp_path / "out"}
    exec(readme.split("```")[1].removeprefix("python\n"), scope)
    assert torch.equal(logits(scope["model"]), logits(model))
    card = hub_card(tmp_path / "out", "somebody/plain")
    assert "library_name: transformers" in card
    assert 'from_pretrained("somebody/plain")' in card
