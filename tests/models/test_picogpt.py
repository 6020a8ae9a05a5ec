"""PicoGPT is a model like any other: counted, cached, padded, saved, folded, healed, exported. Its tokenizer too."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import tensorfold
from tensorfold.algebra.statistics import Statistics
from tensorfold.data.texts import DATA_VARIABLE, load_text
from tensorfold.data.token_cache import TokenCache
from tensorfold.data.tokens import Encoder
from tensorfold.errors import InputError
from tensorfold.evaluation.perplexity import evaluate
from tensorfold.methods import MPO
from tensorfold.models.anatomy import count_parameters, matrices
from tensorfold.models.picogpt import PicoGPTConfig, PicoGPTForCausalLM, character_tokenizer
from tensorfold.models.picogpt.modeling import sinusoids
from tensorfold.nn import MPOLinear

COUNTS = {4: 42_336, 8: 79_168, 16: 177_408, 32: 472_192}


def _modes():
    path = Path(__file__).parents[2] / "studies" / "picogpt" / "modes.py"
    spec = importlib.util.spec_from_file_location("picogpt_modes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


modes = _modes()


def make(**settings):
    """A full-size model whose logits differ enough from token to token to show what reaches them."""
    torch.manual_seed(0)
    return PicoGPTForCausalLM(PicoGPTConfig(initializer_range=0.1, embedding_std=1.0, **settings)).eval()


@pytest.fixture(scope="module")
def model():
    """Not to be changed."""
    return make()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(65, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def test_dense_parameters_are_the_public_codes(model):
    linear = [matrix for matrix in matrices(model).values() if matrix.kind == "linear"]
    assert count_parameters(model) == 808_448
    assert len(linear) == 25
    assert count_parameters(model) - sum(matrix.parameter.numel() for matrix in linear) == modes.DENSE == 13_696
    biased = {matrix.name.rpartition(".")[2] for matrix in linear if matrix.bias is not None}
    assert biased == {"o_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("chi", COUNTS)
def test_the_papers_mpo_counts_to_the_digit(chi):
    plan = tensorfold.plan(PicoGPTConfig(), f"picogpt-mpo-{chi}")
    assert (plan.parameters_before, plan.parameters_after) == (808_448, COUNTS[chi])
    assert len(plan.modules) == 25
    assert plan.modules == tensorfold.plan(PicoGPTConfig(), modes.recipe(chi)).modules
    assert modes.parameters(chi, "paper") == COUNTS[chi]


@pytest.mark.parametrize("sites", [2, 3])
@pytest.mark.parametrize("chi", [1, 16, 50])
def test_sites_can_be_chosen_for_every_matrix(sites, chi):
    plan = tensorfold.plan(PicoGPTConfig(), modes.recipe(chi, sites))
    assert plan.parameters_after == modes.parameters(chi, sites)
    assert {spec.sites for spec in plan.modules.values()} == {sites}
    assert not any(spec.is_padded for spec in plan.modules.values())


@pytest.mark.parametrize("sites", ["paper", 2, 3])
@pytest.mark.parametrize("budget", [42_336, 177_408, 472_192])
def test_equal_parameters_means_the_largest_bond_within_them(sites, budget):
    chi = modes.bond_for(budget, sites)
    assert modes.parameters(chi, sites) <= budget < modes.parameters(chi + 1, sites)
    assert sites != "paper" or COUNTS[chi] == budget


def test_modes_refuse_what_cannot_be():
    with pytest.raises(InputError, match="needed at least 1"):
        modes.recipe(0)
    with pytest.raises(InputError, match='needed "paper", 2 or 3'):
        modes.recipe(4, 4)
    with pytest.raises(InputError, match="which χ = 1 has"):
        modes.bond_for(13_696, 2)


def test_positions_are_the_formula_also_after_loading(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not list(loaded.buffers())
    ids = torch.full((1, 256), 7)
    with torch.no_grad():
        start = loaded(ids, output_hidden_states=True).hidden_states[0][0] - loaded.embed_tokens.weight[7]
    for position, column in ((0, 0), (0, 1), (3, 0), (17, 64), (100, 5), (255, 126), (255, 127)):
        angle = position / 10000 ** (column // 2 * 2 / 128)
        assert start[position, column].item() == pytest.approx((math.cos if column % 2 else math.sin)(angle), abs=1e-4)
    assert sinusoids(torch.arange(3), 4).shape == (3, 4)


def test_logits_with_cache_are_those_without(model, ids, logits):
    with torch.no_grad():
        first = model(ids[:, :20])
        second = model(ids[:, 20:30], past_key_values=first.past_key_values)
        rest = [model(ids[:, k : k + 1], past_key_values=first.past_key_values).logits for k in range(30, 40)]
    torch.testing.assert_close(torch.cat([first.logits, second.logits, *rest], 1), logits, rtol=0, atol=1e-4)


def test_what_comes_later_changes_nothing(model, ids, logits):
    changed = ids.clone()
    changed[:, 25] = (ids[:, 25] + 1) % 65
    with torch.no_grad():
        after = model(changed, use_cache=False).logits
    assert torch.equal(after[:, :25], logits[:, :25])
    assert not torch.allclose(after[:, 25:], logits[:, 25:], atol=1e-2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(ids, logits, attention, side):
    model = make(attn_implementation=attention)
    pad = (5, 0) if side == "left" else (0, 5)
    mask = functional.pad(torch.ones_like(ids), pad)
    with torch.no_grad():
        padded = model(functional.pad(ids, pad, value=9), attention_mask=mask).logits
    assert padded.isfinite().all()
    torch.testing.assert_close(padded[mask.bool()].reshape(logits.shape), logits, rtol=0, atol=1e-4)


def test_eager_attention_shows_its_probabilities(ids, logits):
    model = make()
    with pytest.raises(InputError, match="set_attn_implementation\\('eager'\\)"):
        model(ids, output_attentions=True)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(ids, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-4)
    assert (len(out.attentions), len(out.hidden_states)) == (4, 5)
    for rows in out.attentions:
        assert rows.shape == (2, 4, 40, 40)
        torch.testing.assert_close(rows.sum(-1), torch.ones(2, 4, 40))
        assert not rows.triu(1).any()
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)


def test_labels_give_the_shifted_cross_entropy(model, ids, logits):
    labels = ids.clone()
    labels[:, :10] = -100
    expected = functional.cross_entropy(logits[:, 9:-1].flatten(0, 1), ids[:, 10:].flatten())
    with torch.no_grad():
        torch.testing.assert_close(model(ids, labels=labels).loss, expected)
        assert torch.equal(model(ids, logits_to_keep=3).logits, model(ids).logits[:, -3:])


def test_a_context_too_long_is_refused(model):
    with pytest.raises(InputError, match=r"got 257 tokens; needed at most max_position_embeddings=256"):
        model(torch.zeros(1, 257, dtype=torch.long))
    with torch.no_grad():
        cache = model(torch.zeros(1, 256, dtype=torch.long)).past_key_values
        with pytest.raises(InputError, match="got 257 tokens"):
            model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
    with pytest.raises(InputError, match="one of input_ids and inputs_embeds"):
        model()


def test_a_width_that_heads_cannot_share_is_refused(refused, model, tmp_path):
    with pytest.raises(InputError, match="hidden_size=128 with num_attention_heads=3"):
        PicoGPTConfig(num_attention_heads=3)
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"num_attention_heads": 4', '"num_attention_heads": 3'))
    refused("plan", tmp_path, "--keep", "0.5", says=["num_attention_heads=3"])


def test_gradients_reach_everything_with_checkpointing_too(ids):
    gradients = []
    for checkpointing in (False, True):
        model = make().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


def test_new_weights_are_the_public_codes():
    torch.manual_seed(0)
    for name, parameter in PicoGPTForCausalLM(PicoGPTConfig()).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "norm" in name:
            assert (parameter == 1).all()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05)
    assert make().embed_tokens.weight.std().item() == pytest.approx(1, rel=0.05)


def test_generate_is_the_greedy_loop(model, ids):
    expected = ids[:1, :5]
    with torch.no_grad():
        while expected.shape[1] < 17:
            expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids[:1, :5], **options), expected)
    padded = functional.pad(ids[:1, :5], (3, 0))
    mask = functional.pad(torch.ones(1, 5, dtype=torch.long), (3, 0))
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 3:], expected)


@pytest.mark.parametrize("recipe", [None, "picogpt-mpo-8"], ids=["dense", "folded"])
def test_what_was_saved_is_what_is_loaded(ids, tmp_path, recipe):
    model = make()
    if recipe:
        assert tensorfold.fold(model, recipe).parameters_after == COUNTS[8]
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(ids).logits
        for again in (AutoModelForCausalLM.from_pretrained(tmp_path).eval(), tensorfold.load(tmp_path)):
            assert isinstance(again, PicoGPTForCausalLM)
            assert torch.equal(again(ids).logits, expected)


def test_importing_tensorfold_is_enough_for_transformers_to_know_the_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    code = (
        "import sys, tensorfold; assert 'transformers' not in sys.modules\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        f"AutoConfig.from_pretrained({str(tmp_path)!r})\n"
        f"print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "PicoGPTForCausalLM\n", done.stderr


@pytest.mark.parametrize("sites", ["paper", 2, 3])
def test_folding_at_full_bond_is_exact(ids, logits, sites):
    model = make()
    report = tensorfold.fold(model, modes.recipe(512, sites))
    assert sum(isinstance(module, MPOLinear) for module in model.modules()) == 25
    assert max(report.errors.values()) < 1e-6
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-3)


def test_random_cores_have_the_scale_of_the_weights_they_replace():
    torch.manual_seed(0)
    dense = PicoGPTForCausalLM(PicoGPTConfig())
    kept = {name: matrix.parameter.detach().clone() for name, matrix in matrices(dense).items()}
    tensorfold.fold(dense, modes.recipe(16, 3, init="random"))
    ratios = []
    for name, module in dense.named_modules():
        if isinstance(module, MPOLinear):
            product = module.to_dense()
            ratios.append((product.square().mean() / kept[name].square().mean()).item())
            assert abs(torch.corrcoef(torch.stack([product.flatten(), kept[name].flatten()]))[0, 1]) < 0.1
    assert len(ratios) == 25
    assert sum(ratios) / 25 == pytest.approx(1, abs=0.15)


def test_mpo_starts_are_told_apart():
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    spec = MPO(bond=3, sites=2).spec(16, 24)
    metric = torch.diag(torch.linspace(0.01, 4, 24))

    def product(method, given=None):
        return MPOLinear.from_factors(method.solve(weight, spec, Statistics(given)), spec, weight).to_dense()

    assert torch.equal(product(MPO(bond=3, init="tt-svd"), metric), product(MPO(bond=3)))
    assert not torch.allclose(product(MPO(bond=3), metric), product(MPO(bond=3)))
    one, again, two = (product(MPO(bond=3, init="random", seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.allclose(one, two)


# (out_modes, in_modes, bonds): two to four sites, the bonds uneven where there are several.
VARIANCE = {
    2: ((4, 8), (4, 8), (6,)),
    3: ((2, 4, 4), (4, 4, 4), (3, 8)),
    4: ((2, 4, 2, 4), (2, 2, 4, 4), (2, 7, 5)),
}


@pytest.mark.parametrize("sites", VARIANCE)
def test_random_layers_have_the_output_variance_of_a_dense_one(sites):
    """Mean square over 2000 layers with 16 inputs each, for a new layer of either kind."""
    torch.manual_seed(sites)
    spec = tensorfold.Spec(*VARIANCE[sites])
    dense = torch.nn.Linear(spec.in_features, spec.out_features, bias=False)
    layer = MPOLinear(spec, bias=False)
    found = {dense: 0.0, layer: 0.0}
    with torch.no_grad():
        for _ in range(2000):
            x = torch.randn(16, spec.in_features)
            for each in found:
                each.reset_parameters()
                found[each] += each(x).square().mean().item() / 2000
    assert found[dense] == pytest.approx(1 / 3, rel=0.02)
    assert found[layer] == pytest.approx(found[dense], rel=0.1)


@pytest.fixture(scope="module")
def shakespeare():
    try:
        return "".join(load_text("tinyshakespeare"))
    except InputError:
        pytest.skip(f"no tinyshakespeare in {DATA_VARIABLE}")


def test_every_character_of_shakespeare_comes_back(shakespeare):
    tokenizer = character_tokenizer(shakespeare)
    assert len(tokenizer) == 65
    numbered = {character: number for number, character in enumerate(sorted(set(shakespeare)))}
    text = shakespeare[:50_000] + "".join(numbered)
    ids = tokenizer(text)["input_ids"]
    assert ids == [numbered[character] for character in text]
    assert tokenizer.decode(ids) == text


def test_the_tokenizer_is_the_characters_and_nothing_else(prose, tmp_path):
    text = prose + '\n\n \t"  . , é ı\n'
    tokenizer = character_tokenizer(text)
    assert tokenizer.get_vocab() == {character: k for k, character in enumerate(sorted(set(text)))}
    assert tokenizer.all_special_tokens == []
    assert tokenizer("")["input_ids"] == []
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert each.decode(each(text)["input_ids"]) == text
        with pytest.raises(Exception, match="Missing"):
            each("ß")
    encode = Encoder(tokenizer)
    assert encode.first(text * 3, 500) == encode(text)[:500]
    with pytest.raises(InputError, match="empty text"):
        character_tokenizer("")


def test_text_is_scored_and_cached_character_by_character(model, prose, text_file):
    tokenizer = character_tokenizer(prose)
    assert len(tokenizer) <= model.config.vocab_size
    result = evaluate(model, tokenizer, prose, "disjoint-256", max_tokens=1024)
    assert result.tokens == 1024 - 4
    assert result.parameters == 808_448
    cache = TokenCache.build(text_file, tokenizer, 256)
    assert cache.tokens == len(prose) + 2  # a blank line ends the document
    with pytest.raises(InputError, match="max_position_embeddings=256; use disjoint-256"):
        evaluate(model, tokenizer, prose, "hf-1024")


def test_a_folded_model_heals_and_is_exported(prose, text_file, tmp_path, command):
    dense, tokenizer = make(), character_tokenizer(prose)
    student = make()
    tensorfold.fold(student, modes.recipe(4))
    settings = {"steps": 3, "batch": 2, "block": 32, "lr": 1e-3, "validation_fraction": 0.1, "evaluate_every": 3}
    terms = {"kl": 1.0, "embedding": 1.0, "attention": 1.0, "ffn": 1.0}
    before = [parameter.clone() for parameter in student.parameters()]
    report = tensorfold.heal(
        student, text_file, dense, tokenizer=tokenizer, out=tmp_path / "healed", **settings, **terms, select="last"
    )
    assert report.steps == 3
    assert math.isfinite(report.validation_loss)
    assert all(not torch.equal(old, new) for old, new in zip(before, student.parameters(), strict=True))
    assert student.config._attn_implementation == "sdpa"

    outcome = command("export", tmp_path / "healed", "--to", "dense", "--out", tmp_path / "plain", "--json")
    assert outcome.status == 0, outcome.err
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert count_parameters(plain) == 808_448
    ids = torch.tensor([tokenizer(prose[:100])["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, student.eval()(ids).logits, rtol=0, atol=1e-3)
    assert command("eval", tmp_path / "plain", "--text", text_file, "--protocol", "disjoint-64").status == 0
