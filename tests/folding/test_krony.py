"""Krony-PT and its relatives: every published count to the digit, every initialisation, from the shipped recipes."""

import copy

import pytest
import torch
from transformers import GPT2Config

import tensorfold
from tensorfold import InputError, Kronecker, LowRank, Recipe, Rule, Spec, SpecError
from tensorfold.algebra.contraction.apply import to_dense
from tensorfold.algebra.solvers.solve import relative_error
from tensorfold.algebra.solvers.ttsvd import tt_svd
from tensorfold.algebra.statistics import Statistics
from tensorfold.folding.plan import skeleton
from tensorfold.hf.surgery import hidden_units
from tensorfold.models.anatomy import count_parameters

# (m1, n1) of c_fc -> parameters of one matrix, of the model (with one scalar a matrix where the paper's table has it).
TABLE_1 = {
    (64, 32): (3_200, 67_893_504),
    (64, 48): (3_840, 67_908_864),
    (96, 32): (3_840, 67_908_864),
    (64, 64): (4_672, 67_928_832),
    (128, 32): (4_672, 67_928_832),
    (96, 48): (5_120, 67_939_584),
    (96, 64): (6_528, 67_973_376),
    (128, 48): (6_528, 67_973_376),
    (128, 64): (8_480, 68_020_224),
    (96, 96): (9_472, 68_044_032),
    (192, 48): (9_472, 68_044_032),
    (128, 96): (12_480, 68_116_224),
    (192, 64): (12_480, 68_116_224),
    (128, 128): (16_528, 68_213_376),
    (256, 64): (16_528, 68_213_376),
    (1024, 256): (262_153, 74_108_376),
    (768, 384): (294_920, 74_894_784),
    (1024, 384): (393_222, 77_254_032),
    (768, 768): (589_828, 81_972_576),
    (1536, 384): (589_828, 81_972_576),
    (1024, 768): (786_435, 86_691_144),
    (1536, 768): (1_179_650, 96_128_304),
    (3072, 768): (2_359_297, 124_439_832),
}
# shape, terms, scalars -> model
SEVERAL_TERMS = {
    ((256, 64), 2, False): 68_610_048,
    ((256, 64), 3, False): 69_006_720,
    ((1024, 256), 2, False): 80_400_048,
    ((1024, 256), 3, False): 86_691_720,
    ((1024, 256), 4, False): 92_983_392,
    ((1024, 256), 4, True): 92_983_488,
}
RECIPES = {
    "krony-67m": 67_893_504,
    "krony-74m": 74_108_376,
    "krony-80m-2": 80_400_048,
    "krony-81m": 81_972_576,
    "krony-81m-1536x384": 81_972_576,
    "krony-86m": 86_691_144,
    "krony-92m-4": 92_983_392,
    "krony-92m-4-scalars": 92_983_488,
    "krony-96m-vanloan": 96_128_304,
    "krony-96m-prune": 96_128_304,
    "kngpt2": 85_676_990,
    "tqcompressed-gpt2": 81_336_388,
    "distilgpt2": 81_912_576,
}


@pytest.fixture(scope="module")
def gpt2():
    return skeleton(GPT2Config())


def built_from(plan, model):
    """Parameters of the modules themselves, made on the meta device from the plan's specs."""
    modules = [tensorfold.nn.MPOLinear(spec, bias=False, device="meta") for spec in plan.modules.values()]
    rest = count_parameters(model) - sum(spec.dense_parameters for spec in plan.modules.values())
    return rest + sum(count_parameters(module) for module in modules)


@pytest.mark.parametrize("shape", TABLE_1, ids=str)
def test_table_1(gpt2, shape):
    one, whole = TABLE_1[shape]
    plan = tensorfold.plan(gpt2, Kronecker(factor=shape))
    assert {spec.parameters for spec in plan.modules.values()} == {one}
    assert plan.parameters_after == whole == built_from(plan, gpt2)
    assert not plan.warnings
    assert {spec.attainable_matrix_rank for spec in plan.modules.values()} == {768}


@pytest.mark.parametrize(("shape", "terms", "scalars"), SEVERAL_TERMS, ids=str)
def test_several_terms(gpt2, shape, terms, scalars):
    plan = tensorfold.plan(gpt2, Kronecker(factor=shape, terms=terms, scalars=scalars))
    assert plan.parameters_after == SEVERAL_TERMS[shape, terms, scalars] == built_from(plan, gpt2)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_count_to_the_digit(name):
    """On the meta device from the plan, and on a model really folded (on the meta-sized modules) and counted."""
    recipe = Recipe.load(name)
    assert recipe.model == "gpt2"
    assert recipe.heal
    plan = tensorfold.plan(GPT2Config(), recipe)
    assert plan.parameters_after == RECIPES[name]


@pytest.mark.parametrize("name", ["kngpt2", "tqcompressed-gpt2", "distilgpt2", "krony-92m-4-scalars"])
def test_recipes_fold_a_real_gpt2_of_full_size(name):
    """GPT-2's own sizes with random weights in the shapes the recipe touches; the module count is the plan's."""
    torch.manual_seed(0)
    recipe = Recipe.load(name)
    if name == "tqcompressed-gpt2":  # its searched permutations take minutes at full size; the count does not need them
        rules = [Rule(r.targets, Kronecker(factor=r.method.factor, terms=r.method.terms)) for r in recipe.fold]
        recipe = Recipe(fold=tuple(rules))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(GPT2Config())
    report = tensorfold.fold(model, recipe)
    assert report.parameters_before == 124_439_808
    assert report.parameters_after == count_parameters(model) == RECIPES[name]
    with torch.no_grad():
        assert model(torch.arange(8)[None]).logits.shape == (1, 8, 50257)


def test_shapes_that_do_not_fit_are_refused_and_narrow_ones_are_told(gpt2):
    with pytest.raises(SpecError, match="not divisible by 100; nearest divisors are 96 and 128"):
        tensorfold.plan(gpt2, Kronecker(factor=(100, 32)))
    plan = tensorfold.plan(gpt2, Kronecker(factor=(3072, 1)))
    assert any("reaches rank 1 of 768" in warning for warning in plan.warnings)
    assert "warning" in str(plan)


@pytest.mark.parametrize("shape", TABLE_1, ids=str)
def test_van_loan_is_exact_for_every_shape(shape):
    """Within 1e-6 of the optimum from a full SVD of the rearranged matrix, and not above the randomised SVD's error."""
    weight = torch.randn(3072, 768, generator=torch.Generator().manual_seed(sum(shape)))
    weight[:, :64] *= 4  # a spectrum that is not flat
    spec = Spec.kronecker(3072, 768, shape)
    (m1, m2), (n1, n2) = spec.out_modes, spec.in_modes
    rearranged = weight.reshape(m1, m2, n1, n2).permute(0, 2, 1, 3).reshape(m1 * n1, m2 * n2).double()
    side = rearranged if rearranged.shape[0] <= rearranged.shape[1] else rearranged.T
    total = rearranged.square().sum()
    largest = torch.linalg.eigvalsh(side @ side.T)[-1]
    optimum = ((total - largest).clamp_min(0) / total).sqrt()
    error = relative_error(weight, to_dense(tt_svd(weight, spec), spec))
    assert error == pytest.approx(float(optimum), abs=1e-6)
    u, s, v = torch.svd_lowrank(rearranged.float(), q=1, niter=10)
    randomised = torch.linalg.norm(rearranged - ((u * s) @ v.T).double()) / total.sqrt()
    assert error <= float(randomised) + 1e-6


@pytest.fixture(params=[(24, 12), (12, 24)], ids=["expanding", "contracting"])
def weight(request):
    return torch.randn(*request.param, generator=torch.Generator().manual_seed(7))


def solved(method, weight, metric=None):
    spec = method.spec(*weight.shape)
    layer = tensorfold.nn.MPOLinear.from_factors(method.solve(weight, spec, Statistics(metric)), spec, weight)
    return layer, layer.to_dense().detach()


def test_normalised_has_the_norm_of_the_weight(weight):
    """α = ‖W‖/‖Ŵ‖, in the cores or in every scalar; the direction is Van Loan's."""
    plain = solved(Kronecker(factor=(6, 4), init="van-loan"), weight)[1]
    _, normalised = solved(Kronecker(factor=(6, 4), init="normalized"), weight)
    layer, with_scalars = solved(Kronecker(factor=(6, 4), terms=1, init="normalized", scalars=True), weight)
    alpha = weight.norm() / plain.norm()
    torch.testing.assert_close(normalised, alpha * plain)
    torch.testing.assert_close(with_scalars, alpha * plain)
    torch.testing.assert_close(layer.scalars.detach(), alpha.reshape(1))
    assert relative_error(weight, normalised) > relative_error(weight, plain)


def test_scalars_start_at_what_is_asked(weight):
    layer, dense = solved(Kronecker(factor=(6, 4), terms=3, scalars=True, init="van-loan"), weight)
    assert layer.scalars.tolist() == [1, 1, 1]
    torch.testing.assert_close(dense, solved(Kronecker(factor=(6, 4), terms=3, init="van-loan"), weight)[1])
    layer, scaled = solved(Kronecker(factor=(6, 4), terms=3, scalars=4.0, init="van-loan"), weight)
    assert layer.scalars.tolist() == [4, 4, 4]
    torch.testing.assert_close(scaled, 4 * dense)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_pruning_keeps_every_other_hidden_unit(weight, epsilon):
    """Krony-PT: c_fc keeps even rows ⊗ [1, ε]ᵀ, c_proj even columns ⊗ [1, ε]."""
    _, dense = solved(Kronecker(factor=(12, 12), init="prune", epsilon=epsilon), weight)
    expanding = weight.shape[0] > weight.shape[1]
    even, odd = (dense[::2], dense[1::2]) if expanding else (dense[:, ::2], dense[:, 1::2])
    kept = weight[::2] if expanding else weight[:, ::2]
    torch.testing.assert_close(even, kept)
    torch.testing.assert_close(odd, epsilon * kept)
    with pytest.raises(SpecError, match="does not halve one dimension"):
        solved(Kronecker(factor=(6, 4), init="prune"), weight)


def test_random_has_the_weights_variance_and_is_repeatable(weight):
    method = Kronecker(factor=(6, 4), terms=4, init="random")
    first, second = solved(method, weight)[1], solved(method, weight)[1]
    assert torch.equal(first, second)
    other = solved(Kronecker(factor=(6, 4), terms=4, init="random", seed=1), weight)[1]
    assert not torch.equal(first, other)
    assert not torch.equal(first, solved(method, weight + 1e-3)[1])
    ratios = [
        solved(Kronecker(factor=(6, 4), terms=4, init="random", seed=seed), weight)[1].square().mean()
        for seed in range(200)
    ]
    assert float(torch.stack(ratios).mean() / weight.square().mean()) == pytest.approx(1, abs=0.15)


def test_normalising_what_was_refined_restores_the_norm_of_the_outputs(weight):
    inputs = torch.randn(100, weight.shape[1]) * torch.logspace(0, 1, weight.shape[1])
    metric = inputs.T @ inputs / 100
    refined = solved(Kronecker(factor=(6, 4), init="van-loan", refine=True), weight, metric)[1]
    normalised = solved(Kronecker(factor=(6, 4), init="normalized", refine=True), weight, metric)[1]
    alpha = (weight @ inputs.T).norm() / (refined @ inputs.T).norm()
    torch.testing.assert_close(normalised, alpha * refined, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["van-loan", "prune", "random"])
def test_refining_lowers_the_activation_error_from_every_start(weight, init):
    inputs = torch.randn(100, weight.shape[1]) * torch.logspace(0, 1, weight.shape[1])
    metric = inputs.T @ inputs / 100
    factor = (12, 12) if init == "prune" else (6, 4)
    before = relative_error(weight, solved(Kronecker(factor=factor, init=init), weight, metric)[1], metric)
    after = relative_error(weight, solved(Kronecker(factor=factor, init=init, refine=True), weight, metric)[1], metric)
    assert after < before
    aware = relative_error(weight, solved(Kronecker(factor=factor, init="data-aware"), weight, metric)[1], metric)
    default = relative_error(weight, solved(Kronecker(factor=factor), weight, metric)[1], metric)
    assert aware == default
    with pytest.raises(InputError, match="calibration text"):
        solved(Kronecker(factor=factor, init=init, refine=True), weight)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "opt"])
def test_hidden_order_is_absorbed(tiny, architecture):
    """Reordering hidden units changes the weights, not the function; and at full rank, nothing at all."""
    model, ids = tiny(architecture), torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        before = model(ids).logits
    available = tensorfold.models.anatomy.matrices(model)
    groups = hidden_units(model, available)
    assert len(groups) == 2
    order = torch.randperm(groups[0].down.in_features, generator=torch.Generator().manual_seed(0))
    old = tensorfold.models.anatomy.dense_weight(groups[0].down.module).detach().clone()
    tensorfold.hf.surgery.reorder_hidden(groups[0], order)
    assert not torch.equal(old, tensorfold.models.anatomy.dense_weight(groups[0].down.module))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("permute", ["hidden", "all"])
@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
def test_permutations_lower_the_error_and_survive_saving(
    tiny, tokenizer, prose, architecture, permute, calibrated, tmp_path
):
    text = [prose] if calibrated else None
    errors = {}
    for setting in ("none", permute):
        model = tiny(architecture)
        method = Kronecker(keep=0.5, permute=setting)
        report = tensorfold.fold(model, method, tokenizer, text, calibration_tokens=300 if calibrated else None)
        errors[setting] = sum(report.errors.values())
    assert errors[permute] < errors["none"]
    ids = torch.arange(20)[None]
    model.save_pretrained(tmp_path)
    again = tensorfold.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
        assert torch.equal(copy.deepcopy(again)(ids).logits, again(ids).logits)
    stored = {name for name in again.state_dict() if name.endswith(("in_order", "out_position"))}
    assert bool(stored) is (permute == "all")


def test_fused_attention_is_split_and_folded_in_parts(tiny, tmp_path):
    """c_attn as query, key and value: full rank changes nothing, and the parts survive saving."""
    model, ids = tiny("gpt2"), torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        before = model(ids).logits
    full = Recipe(fold=(Rule(["c_attn"], LowRank(rank=32), split=3),))
    plan = tensorfold.plan(model, full)
    assert "transformer.h.0.attn.c_attn.0" in plan.modules
    assert isinstance(model.transformer.h[0].attn.c_attn, torch.nn.Module)
    report = tensorfold.fold(model, full)
    assert report.modules == plan.modules
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = tensorfold.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    with pytest.raises(InputError, match="does not divide"):
        tensorfold.plan(tiny("gpt2"), Recipe(fold=(Rule(["c_attn"], LowRank(rank=3), split=7),)))


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3"])
def test_dropping_layers_leaves_a_plain_model(tiny, tmp_path, architecture):
    from transformers import AutoModelForCausalLM

    model = tiny(architecture, num_hidden_layers=2) if architecture == "gpt2" else tiny(architecture)
    recipe = Recipe(fold=(), layers=(1,))
    plan = tensorfold.plan(model, recipe)
    before = count_parameters(model)
    report = tensorfold.fold(model, recipe)
    assert report.parameters_before == before
    assert report.parameters_after == plan.parameters_after == count_parameters(model) < before
    ids = torch.arange(20)[None]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.num_hidden_layers == 1
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    assert again.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 23)
    with pytest.raises(InputError, match="indices from 0 to 0"):
        tensorfold.plan(again, recipe)


def test_every_shape_of_a_matrix_is_listed_with_its_cost(command, tmp_path):
    """``tensorfold plan MODEL --shapes``; the 23 rows of the paper's Table 1 are among the full-rank ones."""
    import json

    GPT2Config().save_pretrained(tmp_path)
    listed = json.loads(command("plan", tmp_path, "--shapes", "--json").out)["shapes"]
    found = {tuple(row["factor"]): row for row in listed if row["out_features"] == 3072 and row["full_rank"]}
    assert TABLE_1.keys() - {(3072, 768)} <= found.keys()
    assert all(found[shape]["parameters"] == TABLE_1[shape][0] for shape in TABLE_1 if shape in found)
    assert found[768, 768]["macs"] == 592_896
    narrow = [row for row in listed if row["factor"] == [3072, 1]]
    assert narrow[0]["attainable_rank"] == 1
    table = command("plan", tmp_path, "--shapes").out
    assert "768×768" in table
    assert "shapes of one term reach full rank" in table
