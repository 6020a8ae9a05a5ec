"""Untying: a table and a head that were one weight take structures of their own, and the counts say what that costs."""

import importlib.util
import itertools
import json

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, RobertaConfig

import tensorfold
from tensorfold import Graded, InputError, Kronecker, LowRank, Recipe, Rule, TokenMPS
from tensorfold.export.checkpoints import export_dense, export_onnx
from tensorfold.export.tracing import PACKAGES
from tensorfold.hf.surgery import untie_head, without_weights
from tensorfold.models.anatomy import count_parameters, matrices
from tensorfold.nn import FoldedModule, GradedEmbedding, MPOLinear, TokenMPSEmbedding

# Plain, gated, with scaled embeddings, with a bias of the head's own, and with a bias that is tied as well.
ARCHITECTURES = ["gpt2", "llama", "gemma3", "phi", "roberta"]
TABLE, HEAD = Rule("embedding", TokenMPS(rank=3)), Rule(["lm_head"], LowRank(rank=7))
FOLDED = {"both": (TABLE, HEAD), "table": (TABLE,), "head": (HEAD,), "neither": (Rule("mlp", LowRank(keep=0.9)),)}
WEIGHT = 300 * 32
IDS = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


@pytest.fixture(scope="module")
def make(tiny):
    """``make(architecture)``: a tied model whose head's bias, where it has one, is seen in the logits."""

    def tied(architecture, **settings):
        if architecture != "roberta":
            model = tiny(architecture, **settings)
        else:
            torch.manual_seed(0)
            config = RobertaConfig(
                vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                max_position_embeddings=130, is_decoder=True, tie_word_embeddings=True,
            )  # fmt: skip
            model = AutoModelForCausalLM.from_config(config).eval()
        bias = model.get_output_embeddings().bias
        if bias is not None:
            nn.init.normal_(bias)
        return model

    return tied


def rules(model, which):
    """The rules of ``FOLDED``, with the head under this model's name."""
    (name,) = (name for name, module in model.named_modules() if module is model.get_output_embeddings())
    return tuple(Rule([name], rule.method) if rule is HEAD else rule for rule in FOLDED[which])


def ends(model):
    return model.get_input_embeddings(), model.get_output_embeddings()


def assert_untied(model):
    table, head = ends(model)
    ours = [parameter.data_ptr() for parameter in model.parameters()]
    assert len(ours) == len(set(ours))
    assert not {id(p) for p in table.parameters()} & {id(p) for p in head.parameters()}
    assert model.config.tie_word_embeddings is False
    assert model.get_expanded_tied_weights_keys(all_submodels=True) == model.all_tied_weights_keys == {}


def assert_still_tied(model, before):
    table, head = ends(model)
    assert head.weight is table.weight
    assert model.config.tie_word_embeddings is True
    assert len(model.all_tied_weights_keys) == len(model._tied_weights_keys) == 1
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_gpt2_counts_to_the_digit():
    """The shared weight once before, and what is there afterwards; nothing of it needs weights."""
    pair = (Rule("embedding", LowRank(rank=64)), Rule(["lm_head"], LowRank(rank=128)))
    plan = tensorfold.plan(GPT2Config(), Recipe(pair, untie=True))
    table = 50_257 * 768
    assert plan.parameters_before == 124_439_808
    assert plan.parameters_after == 124_439_808 - table + (64 + 128) * (50_257 + 768) == 95_639_232
    assert {name: spec.ranks for name, spec in plan.modules.items()} == {"transformer.wte": (64,), "lm_head": (128,)}
    said = f"untying lm_head from transformer.wte added {table:,} parameters, no more than folding took away"
    assert plan.warnings == (said,)
    assert plan.to_dict()["warnings"] == [said]
    assert plan.kept == (64 + 128) * (50_257 + 768) / (2 * table)

    larger = tensorfold.plan(GPT2Config(), Recipe(pair[1:], untie=True))
    assert larger.parameters_after == 124_439_808 + 128 * (50_257 + 768)
    said = f"untying lm_head from transformer.wte added {table:,} parameters, and the model is 6,531,200 larger"
    assert f"warning: {said} than before" in str(larger)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_untying_alone_changes_no_logit(make, tmp_path, architecture):
    model = make(architecture).requires_grad_(False)
    expected, before = logits(model), count_parameters(model)
    table, head = ends(model)
    bias = head.bias
    matrix = untie_head(model)
    assert (matrix.module, model.get_submodule(matrix.tied_head)) == (table, head)
    assert torch.equal(logits(model), expected)
    assert torch.equal(head.weight, table.weight)
    assert_untied(model)
    lesser = 300 if architecture == "roberta" else 0
    assert count_parameters(model) == before + WEIGHT + lesser
    assert (head.bias is bias) == (lesser == 0)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {"embedding", "linear"} <= {matrices(model)[name].kind for name in (matrix.name, matrix.tied_head)}
    model.tie_weights()
    assert_untied(model)
    assert type(model)._tied_weights_keys
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(tensorfold.load(tmp_path)), expected)
    assert untie_head(model) is None


# RoBERTa's embeddings make buffers as they are built that a folded table, tied or not, leaves unmade on loading.
@pytest.mark.parametrize(
    ("architecture", "which"),
    [
        each
        for each in itertools.product(ARCHITECTURES, FOLDED)
        if each not in (("roberta", "both"), ("roberta", "table"))
    ],
)
def test_what_is_folded_apart_is_saved_and_loaded_apart(make, tmp_path, architecture, which):
    model = make(architecture)
    dense = model.get_input_embeddings().weight.detach().clone()
    recipe = Recipe(rules(model, which), untie=True)
    plan = tensorfold.plan(model.config, recipe)
    report = tensorfold.fold(model, recipe)
    assert report.plan == plan
    assert len(plan.warnings) == 1
    assert (plan.parameters_after > plan.parameters_before) == ("larger" in plan.warnings[0])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"] is False
    with safe_open(tmp_path / "model.safetensors", framework="pt") as tensors:
        assert set(tensors.keys()) == {name for name, _ in model.named_parameters()}
    for each in (model, tensorfold.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(logits(each), expected)
        assert_untied(each)
        assert count_parameters(each) == report.parameters_after
        table, head = ends(each)
        assert isinstance(table, TokenMPSEmbedding) == (which in ("both", "table"))
        assert isinstance(head, MPOLinear) == (which in ("both", "head"))
        assert isinstance(table, FoldedModule) or torch.equal(table.weight, dense)
        assert isinstance(head, FoldedModule) or torch.equal(head.weight, dense)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3", "phi"])
def test_full_rank_apart_is_what_was_tied(make, architecture):
    model = make(architecture)
    expected = logits(model)
    recipe = Recipe((Rule("embedding", TokenMPS(rank=4)), Rule(["lm_head"], LowRank(rank=32))), untie=True)
    report = tensorfold.fold(model, recipe)
    assert max(report.errors.values()) < 1e-6
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_an_untied_head_is_measured_like_any_linear_layer(make, tokenizer, prose):
    model = make("llama")
    recipe = Recipe((Rule("embedding", Graded(keep=0.5)), HEAD, Rule("mlp", LowRank(keep=0.5))), untie=True)
    report = tensorfold.fold(model, recipe, tokenizer, [prose], calibration_tokens=256)
    assert report.metrics["lm_head"] == "activation"
    assert report.metrics["model.embed_tokens"] == "text"
    assert isinstance(model.get_input_embeddings(), GradedEmbedding)
    free = make("llama")
    tensorfold.fold(free, recipe)
    assert not torch.allclose(free.lm_head.to_dense(), model.lm_head.to_dense(), atol=1e-4)


def test_an_untied_model_is_folded_as_without_the_key(tiny):
    folded = [tiny("llama", tied=False), tiny("llama", tied=False)]
    reports = [tensorfold.fold(model, Recipe((TABLE, HEAD), untie=k == 0)) for k, model in enumerate(folded)]
    assert reports[0].plan == reports[1].plan
    assert reports[0].plan.warnings == ()
    assert torch.equal(logits(folded[0]), logits(folded[1]))


def test_with_fewer_layers_and_split_matrices(make, tmp_path):
    model = make("gpt2")
    entries = [
        {"targets": "embedding", "method": "kronecker", "factor": [300, 16], "permute": "all"},
        {"targets": ["lm_head"], "method": "low-rank", "rank": 4},
        {"targets": ["c_attn"], "method": "low-rank", "rank": 4, "split": 3},
    ]
    report = tensorfold.fold(model, {"untie": True, "layers": [1], "fold": entries})
    assert report.parameters_after == count_parameters(model)
    assert report.parameters_before == count_parameters(make("gpt2"))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(tensorfold.load(tmp_path)), logits(model))


def test_what_is_tied_counts_and_not_what_the_configuration_says(make, tiny):
    recipe = Recipe((HEAD,), untie=True)
    by_hand = tiny("llama", tied=False)
    by_hand.lm_head.weight = by_hand.model.embed_tokens.weight
    own = make("llama")
    own.lm_head.weight = nn.Parameter(torch.randn(300, 32))
    kept = own.lm_head.weight.detach().clone()
    for model, added in ((by_hand, WEIGHT), (own, 0)):
        before = count_parameters(model)
        plan = tensorfold.plan(model, recipe)
        assert (plan.parameters_before, plan.parameters_after) == (before, before + added - WEIGHT + 7 * 332)
        assert len(plan.warnings) == (added > 0)
        assert count_parameters(model) == before
        assert tensorfold.fold(model, recipe).plan == plan
        assert_untied(model)
    best = MPOLinear.from_dense(kept, LowRank(rank=7).spec(300, 32)).to_dense()
    torch.testing.assert_close(own.lm_head.to_dense(), best, rtol=1e-4, atol=1e-4)


def test_a_copy_without_weights_shares_what_the_model_shares(make):
    model = make("gemma3")
    copy = without_weights(model)
    assert {parameter.device.type for parameter in copy.parameters()} == {"meta"}
    assert copy.lm_head.weight is copy.model.embed_tokens.weight
    untie_head(copy)
    assert copy.lm_head.weight is not copy.model.embed_tokens.weight
    assert_still_tied(model, state(model))


def test_planning_leaves_the_model_tied(make):
    model = make("llama")
    before = state(model)
    plan = tensorfold.plan(model, Recipe((TABLE, HEAD), untie=True))
    assert plan == tensorfold.plan(model.config, Recipe((TABLE, HEAD), untie=True))
    assert_still_tied(model, before)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(["lm_head"], TokenMPS(rank=2)), "lm_head: token-mps folds embedding tables"),
        (Rule(["lm_head"], LowRank(rank=33)), r"lm_head.*33"),
        (Rule(["lm_head"], Kronecker(keep=0.5, init="data-aware")), "lm_head.*calibration text"),
        (Rule(["lm_heads"], LowRank(rank=3)), "did you mean 'lm_head'"),
        (HEAD, "shared by"),
        (TABLE, "model.embed_tokens: its weight holds NaN"),
    ],
)
def test_a_refused_fold_leaves_the_head_tied(make, rule, message):
    model = make("llama")
    if message == "shared by":
        model.model.layers[1].more = nn.Linear(32, 300, bias=False)
        model.model.layers[1].more.weight = model.lm_head.weight
        rule, message = TABLE, "model.embed_tokens: its weight is shared by .*layers.1.more"
    elif "NaN" in message:
        model.lm_head.weight.data[5, 5] = torch.nan
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        tensorfold.fold(model, Recipe((rule,), untie=True))
    before = {name: tensor.nan_to_num() for name, tensor in before.items()}
    model.lm_head.weight.data.nan_to_num_()
    assert_still_tied(model, before)


@pytest.mark.parametrize("targets", [["lm_head"], "lm_head", {"regex": "^lm_head$"}], ids=str)
def test_a_tied_head_as_a_target_says_how_to_make_it_one(make, targets):
    says = r"matches nothing.*lm_head is tied to model\.embed_tokens.*untie: true \(--untie\)"
    with pytest.raises(InputError, match=says):
        tensorfold.plan(make("llama"), Recipe((Rule(targets, LowRank(rank=3)),)))


@pytest.mark.parametrize("value", ["yes", 1, None, []])
def test_untie_is_true_or_false(value):
    with pytest.raises(InputError, match=r"untie=.*needed true or false"):
        Recipe.from_dict({"untie": value, "fold": [{"targets": "mlp", "method": "low-rank", "keep": 0.5}]})
    with pytest.raises(InputError, match="at least one entry"):
        Recipe((), untie=True)
    with pytest.raises(InputError, match="did you mean 'untie'"):
        Recipe.from_dict({"unite": True, "fold": []})


@pytest.mark.parametrize("which", ["both", "table", "head"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3", "phi"])
def test_dense_export(make, tmp_path, architecture, which):
    model = make(architecture)
    tensorfold.fold(model, Recipe(rules(model, which), untie=True))
    report = export_dense(model, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)
    assert_untied(plain)
    assert report.parameters == count_parameters(plain) == count_parameters(make(architecture)) + WEIGHT


@pytest.mark.skipif(not all(map(importlib.util.find_spec, PACKAGES["onnx"])), reason="needs the ONNX packages")
@pytest.mark.parametrize("which", ["both", "head"])
def test_onnx_export(make, tmp_path, which):
    model = make("llama", num_hidden_layers=1)
    tensorfold.fold(model, Recipe(rules(model, which), untie=True))
    report = export_onnx(model, tmp_path / "out")
    assert report.difference < 1e-4
    assert report.parameters == count_parameters(model)


@pytest.mark.parametrize("which", ["both", "table", "head"])
def test_healing_trains_each_by_itself(make, tokenizer, text_file, tmp_path, which):
    model, teacher = make("gemma3"), make("gemma3")
    tensorfold.fold(model, Recipe(rules(model, which), untie=True))
    before = [[parameter.detach().clone() for parameter in end.parameters()] for end in ends(model)]
    settings = {"steps": 2, "batch": 2, "block": 16, "lr": 1e-2, "validation_fraction": 0.2, "kl": 1.0}
    tensorfold.heal(model, text_file, teacher=teacher, tokenizer=tokenizer, train="all", select="last", **settings)
    for end, old in zip(ends(model), before, strict=True):
        assert not any(torch.equal(new, was) for new, was in zip(end.parameters(), old, strict=True))
    assert_untied(model)
    assert_still_tied(teacher, state(teacher))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(tensorfold.load(tmp_path)), logits(model))


def test_from_the_command_line(command, dense_directory, tmp_path):
    options = ["--keep", "0.4", "--targets", "embedding,lm_head", "--untie"]
    planned = json.loads(command("plan", dense_directory, *options, "--json").out)
    assert list(planned["modules"]) == ["model.embed_tokens", "lm_head"]
    done = command("fold", dense_directory, *options, "--out", tmp_path / "out")
    assert done.status == 0, done.err
    assert f"warning: {planned['warnings'][0]}\n" in done.out
    model = tensorfold.load(tmp_path / "out")
    assert count_parameters(model) == planned["parameters_after"]
    assert_untied(model)
    card = json.loads((tmp_path / "out" / "tensorfold.json").read_text(encoding="utf-8"))
    assert card["recipe"] == "--keep 0.4 --targets embedding,lm_head --untie"


def test_key_and_flag_are_one(command, dense_directory, tmp_path):
    recipe, keyed = tmp_path / "recipe.yaml", tmp_path / "keyed.yaml"
    text = "fold: [{targets: [lm_head], method: low-rank, rank: 4}]\n"
    recipe.write_text(text, encoding="utf-8")
    keyed.write_text(f"untie: true\n{text}", encoding="utf-8")
    flagged = command("plan", dense_directory, "--recipe", recipe, "--untie", "--json")
    assert flagged.status == 0
    assert list(json.loads(flagged.out)["modules"]) == ["lm_head"]
    assert command("plan", dense_directory, "--recipe", keyed, "--json") == flagged
    assert command("plan", dense_directory, "--recipe", keyed, "--untie", "--json") == flagged


def test_shapes_of_an_untied_head(command, refused, dense_directory):
    arguments = ["plan", dense_directory, "--shapes", "--targets", "lm_head"]
    refused(*arguments, says=["lm_head is tied to model.embed_tokens", "--untie"])
    rows = json.loads(command(*arguments, "--untie", "--json").out)["shapes"]
    assert rows
