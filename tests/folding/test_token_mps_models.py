"""TensorGPT in whole models: plans to the digit, tied and untied, positions, new tokens, checkpoints, exports."""

import copy
import importlib.util
import json

import pytest
import torch
from transformers import GPT2Config

import tensorfold
from tensorfold import InputError, LowRank, Recipe, Rule, TokenMPS
from tensorfold.export.checkpoints import export_onnx
from tensorfold.export.engine_model import open_exported
from tensorfold.export.tracing import PACKAGES
from tensorfold.healing.setup import choose_trained
from tensorfold.hf.dense import plain_model
from tensorfold.models.anatomy import count_parameters, matrices
from tensorfold.models.targets import match
from tensorfold.nn import MPOEmbedding, TokenMPSEmbedding, TokenMPSHead
from tensorfold.recipes.settings import HealSettings

# With and without a scale (Gemma), a bias of the head (Phi), and a table of positions (GPT-2, OPT).
ARCHITECTURES = ["gpt2", "llama", "gemma3", "opt", "phi"]
BOTH = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
IDS = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


@pytest.fixture(scope="module")
def make(tiny):
    """``make(architecture, tied)``: tables at rank 3 of 2^5, and the MLP halved."""

    def folded(architecture, tied=True, **settings):
        model = tiny(architecture, tied=tied, **settings)
        if model.get_output_embeddings().bias is not None:
            torch.nn.init.normal_(model.get_output_embeddings().bias)
        tables = ["embedding", "positions"] if architecture == "gpt2" else ["embedding"]
        rules = (Rule(tables, TokenMPS(rank=3, modes=(2,) * 5)), Rule("mlp", LowRank(keep=0.5)))
        return model, tensorfold.fold(model, Recipe(rules))

    return folded


def assert_tied(model, tied=True):
    head = model.get_output_embeddings()
    assert isinstance(head, TokenMPSHead) is tied
    if tied:
        cores = model.get_input_embeddings().cores
        assert all(a is b for a, b in zip(head.cores, cores, strict=True))


def test_distilgpt2_is_as_much_smaller_as_published():
    """46.89 % fewer parameters, to the last one: 51281 rows of 19 numbers instead of 768."""
    recipe = Recipe.load("tensorgpt-distilgpt2")
    plan = tensorfold.plan(GPT2Config(n_layer=6), recipe)
    assert plan.parameters_before == 81_912_576
    assert plan.parameters_after == 81_912_576 - 51_281 * (768 - 19)
    assert round(100 * (1 - plan.parameters_after / plan.parameters_before), 2) == 46.89
    assert list(plan.modules) == ["transformer.wte", "transformer.wpe"]


def test_gpt2_plan_says_what_it_does():
    plan = tensorfold.plan(GPT2Config(), Recipe.load("tensorgpt-gpt2"))
    assert plan.parameters_after == 124_439_808 - 50_257 * (768 - 232) == 97_502_056
    assert plan.to_dict()["modules"]["transformer.wte"] == {
        "out_modes": [50257],
        "in_modes": [2] * 10,
        "ranks": [2, 4, 4, 4, 4, 4, 4, 4, 2],
        "vocabulary": 50257,
        "width": 768,
        "modes": [2] * 10,
        "rank": 4,
        "parameters": 50257 * 232,
        "bytes": 4 * 50257 * 232,
    }
    assert "50257 × MPS(2^10, rank 4)" in str(plan)
    assert "30.2%" in str(plan)
    assert tensorfold.plan(GPT2Config(), TokenMPS(keep=0.303, modes=(2,) * 10)).modules == plan.modules


def test_linear_layers_are_refused_by_name():
    with pytest.raises(InputError, match=r"transformer\.h\.0\.mlp\.c_fc: token-mps folds embedding tables.*targets:"):
        tensorfold.plan(GPT2Config(), Recipe((Rule("mlp", TokenMPS(rank=2)),)))
    with pytest.raises(InputError, match=r"transformer\.wte.*product is 512"):
        tensorfold.plan(GPT2Config(), TokenMPS(modes=(2,) * 9, rank=1))


def test_positions_are_plain_tables_only(tiny):
    """GPT-2's table is one; OPT's shifts its index; the others rotate."""
    for architecture in ("gpt2", "llama", "opt", "gemma3"):
        available = matrices(tiny(architecture))
        found = [name for name, matrix in available.items() if matrix.group == "positions"]
        assert found == (["transformer.wpe"] if architecture == "gpt2" else [])
        if not found:
            with pytest.raises(InputError, match="needed a learned table of positions"):
                match("positions", available)
    available = matrices(tiny("gpt2"))
    assert match("positions", available) == match(["wpe"], available) == ["transformer.wpe"]
    assert match("embedding", available) == ["transformer.wte"]


def test_positions_take_shared_structures_too(tiny, tmp_path):
    model = tiny("gpt2")
    report = tensorfold.fold(model, Recipe((Rule(["wpe"], LowRank(rank=5)), Rule("embedding", TokenMPS(rank=2)))))
    assert isinstance(model.transformer.wpe, MPOEmbedding)
    assert isinstance(model.transformer.wte, TokenMPSEmbedding)
    assert count_parameters(model) == report.parameters_after
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(tensorfold.load(tmp_path)), logits(model))


@BOTH
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3"])
def test_full_rank_changes_nothing(tiny, architecture, tied):
    model = tiny(architecture, tied=tied)
    before = logits(model)
    report = tensorfold.fold(model, TokenMPS(rank=4))
    assert max(report.errors.values()) < 1e-6
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


@BOTH
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_checkpoints_and_plain_models(make, tmp_path, architecture, tied):
    model, report = make(architecture, tied)
    expected = logits(model)
    assert report.parameters_after == count_parameters(model)
    assert 0.3 < report.to_dict()["modules"][next(iter(report.modules))]["error"] < 1
    model.save_pretrained(tmp_path)
    loaded = tensorfold.load(tmp_path)
    for each in (loaded, copy.deepcopy(loaded)):
        assert torch.equal(logits(each), expected)
        assert count_parameters(each) == report.parameters_after
        assert_tied(each, tied)
    plain = plain_model(loaded)
    assert not any(isinstance(module, TokenMPSEmbedding | TokenMPSHead) for module in plain.modules())
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)
    model(IDS, labels=IDS).loss.backward()
    assert all(core.grad.abs().sum() > 0 for core in model.get_input_embeddings().cores)


@BOTH
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_new_tokens(make, tmp_path, architecture, tied):
    """In a folded model and in a loaded one: the old logits stay, the new tokens work, and all of it can be saved."""
    model, _ = make(architecture, tied)
    model.save_pretrained(tmp_path / "before")
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    for number, each in enumerate((model, tensorfold.load(tmp_path / "before"))):
        expected, alive = logits(each), each(IDS).logits.sum()  # a graph of the old size must not be in the way
        old = [core.detach().clone() for core in each.get_input_embeddings().cores]
        tensorfold.append_tokens(each, vectors, None if tied else 2 * vectors)
        cores = each.get_input_embeddings().cores
        assert all(torch.equal(core[:300], before) for core, before in zip(cores, old, strict=True))
        got = logits(each)
        assert got.shape == (2, 24, 303)
        torch.testing.assert_close(got[..., :300], expected, rtol=1e-5, atol=1e-5)
        assert (each.config.vocab_size, each.vocab_size) == (303, 303)
        assert_tied(each, tied)
        if not tied:
            assert torch.equal(each.get_output_embeddings().weight[300:], 2 * vectors)
        ids = torch.tensor([[300, 5, 302, 301]])
        each(ids, labels=ids).loss.backward()
        assert all(
            parameter.grad.shape == parameter.shape for parameter in each.parameters() if parameter.grad is not None
        )
        each.save_pretrained(tmp_path / str(number))
        loaded = tensorfold.load(tmp_path / str(number))
        assert torch.equal(logits(loaded, ids), logits(each, ids))
        assert_tied(loaded, tied)
        torch.testing.assert_close(logits(plain_model(loaded), ids), logits(each, ids), rtol=1e-4, atol=1e-4)
        del alive


@BOTH
def test_resizing_as_transformers_does(make, tmp_path, tied):
    """On a folded model, a loaded one and a copy: the new tokens are the mean of all rows."""
    model, _ = make("llama", tied)
    model.save_pretrained(tmp_path)
    loaded = tensorfold.load(tmp_path)
    for each in (model, loaded, copy.deepcopy(loaded)):
        table = each.get_input_embeddings()
        mean = table.to_dense().detach().mean(0, keepdim=True)
        assert each.resize_token_embeddings() is each.resize_token_embeddings(300) is table
        assert each.resize_token_embeddings(301, pad_to_multiple_of=8) is table is each.get_input_embeddings()
        assert each.config.vocab_size == table.num_embeddings == logits(each).shape[-1] == 304
        expected = TokenMPSEmbedding.from_dense(mean, TokenMPS(rank=3, modes=(2,) * 5).spec(1, 32))(
            torch.zeros(4, dtype=torch.long)
        )
        torch.testing.assert_close(table(torch.arange(300, 304)), expected)
        for arguments in ((299,), (None, None, False)):
            with pytest.raises(InputError, match=r"needed at least as many.*tensorfold\.append_tokens"):
                each.resize_token_embeddings(*arguments)


def test_tokens_that_cannot_be_added_are_refused_untouched(tiny, make):
    shared = tiny("llama")
    tensorfold.fold(shared, Recipe((Rule("embedding", LowRank(rank=4)),)))
    split = tiny("llama", tied=False)
    tensorfold.fold(split, Recipe((Rule("embedding", TokenMPS(rank=2)), Rule(["lm_head"], LowRank(rank=4)))))
    tied, untied = make("llama")[0], make("llama", tied=False)[0]
    vectors = torch.randn(2, 32)
    for model, calls, words in (
        (shared, [lambda m: m.resize_token_embeddings(302)], "MPOEmbedding; needed a TokenMPSEmbedding"),
        (shared, [lambda m: tensorfold.append_tokens(m, vectors)], "resize_token_embeddings of the dense model"),
        (split, [lambda m: tensorfold.append_tokens(m, vectors)], "MPOLinear that is not tied"),
        (tied, [lambda m: tensorfold.append_tokens(m, vectors, vectors)], "needed none"),
        (untied, [lambda m: tensorfold.append_tokens(m, vectors, vectors[:1])], r"needed \(2, 32\)"),
        (untied, [lambda m: tensorfold.append_tokens(m, vectors[:, 1:])], "one row for each new token"),
    ):
        before = logits(model)
        for call in calls:
            with pytest.raises(InputError, match=words):
                call(model)
        assert torch.equal(logits(model), before)
        assert model.config.vocab_size == 300


def test_healing_knows_cores_and_tables(make):
    model, _ = make("gpt2")
    tables = {id(p) for table in (model.transformer.wte, model.transformer.wpe) for p in table.parameters()}
    assert len(tables) == 10
    folded = {id(p) for block in model.transformer.h for m in (block.mlp.c_fc, block.mlp.c_proj) for p in m.cores}
    assert {id(p) for p in choose_trained(model, HealSettings(train="cores"))} == tables | folded | {
        id(m.bias) for block in model.transformer.h for m in (block.mlp.c_fc, block.mlp.c_proj)
    }
    rest = {id(p) for p in choose_trained(model, HealSettings(train="all-but-embeddings"))}
    assert rest == {id(p) for p in model.parameters()} - tables


def test_a_checkpoint_that_folds_a_layer_like_a_table_is_refused(make, tmp_path):
    model, _ = make("llama")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    spec = {"vocabulary": 48, "width": 32, "modes": [2] * 5, "rank": 2}
    config["quantization_config"]["modules"]["model.layers.0.mlp.up_proj"] = spec
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match=r"up_proj: 48 × MPS\(2\^5, rank 2\) is a table's"):
        tensorfold.load(tmp_path)


def test_from_the_command_line(command, dense_directory, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("fold: [{targets: embedding, method: token-mps, modes: [2, 2, 2, 2, 2], keep: 0.6}]\n")
    planned = json.loads(command("plan", dense_directory, "--recipe", recipe, "--json").out)
    done = command("fold", dense_directory, "--recipe", recipe, "--out", tmp_path / "out", "--json")
    assert done.status == 0, done.err
    folded = json.loads(done.out)["modules"]["model.embed_tokens"]
    assert folded["rank"] == 1
    assert folded["parameters"] == planned["modules"]["model.embed_tokens"]["parameters"] == 300 * 10
    assert 0 < folded["error"] < 1
    model = tensorfold.load(tmp_path / "out")
    assert_tied(model)
    assert count_parameters(model) == planned["parameters_after"]


@pytest.mark.skipif(not all(map(importlib.util.find_spec, PACKAGES["onnx"])), reason="needs the ONNX packages")
def test_onnx_holds_the_cores(make, tmp_path):
    model, _ = make("llama", num_hidden_layers=1)
    report = export_onnx(model, tmp_path / "out")
    assert report.difference < 1e-4
    got = open_exported(tmp_path / "out")(IDS[:1, :9]).logits
    torch.testing.assert_close(got, logits(model, IDS[:1, :9]), rtol=1e-3, atol=1e-4)
    assert report.bytes < 4 * 1.5 * count_parameters(model)


@BOTH
def test_healing_trains_the_cores_and_keeps_the_tie(make, tokenizer, text_file, tied):
    model, _ = make("gpt2", tied)
    before = [core.detach().clone() for core in model.transformer.wte.cores]
    settings = {"steps": 2, "batch": 2, "block": 16, "lr": 1e-2, "validation_fraction": 0.2}
    tensorfold.heal(model, text_file, tokenizer=tokenizer, train="cores", **settings)
    assert not any(torch.equal(core, old) for core, old in zip(model.transformer.wte.cores, before, strict=True))
    assert_tied(model, tied)
