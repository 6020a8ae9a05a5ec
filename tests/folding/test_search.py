"""Budgets: error curves, their division, and folds that choose for themselves."""

import copy
import re
from dataclasses import replace

import pytest
import torch

import tensorfold
from tensorfold import Auto, InputError, LowRank, Recipe, Rule, Spec, SpecError
from tensorfold.algebra.allocation import pivoted_costs
from tensorfold.algebra.contraction.apply import to_dense
from tensorfold.algebra.solvers.low_rank import error_curve, whitened_low_rank
from tensorfold.algebra.solvers.solve import relative_error
from tensorfold.calibration import block_stream as calibrate
from tensorfold.calibration import gradients
from tensorfold.calibration.block_calls import output_of
from tensorfold.calibration.packed_symmetric import numbers
from tensorfold.calibration.windows import calibration_windows
from tensorfold.folding import in_memory as folding
from tensorfold.folding import rank_search as search
from tensorfold.folding import stored_gradients
from tensorfold.folding.plan import plan
from tensorfold.models.anatomy import matrices


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size, seed, rank=None):
    x = random(rank or 3 * size, size, seed=seed) * torch.logspace(0, -2, size, dtype=torch.float64)
    return x.T @ x


@pytest.mark.parametrize("shape", [(20, 9), (9, 20), (12, 12)])
@pytest.mark.parametrize("sides", ["neither", "inputs", "outputs", "both"])
def test_curves_are_the_errors_of_the_best_matrices(shape, sides):
    weight = random(*shape)
    metric = moment(shape[1], 1) if sides in ("inputs", "both") else None
    outputs = moment(shape[0], 2) if sides in ("outputs", "both") else None
    curve = error_curve(weight, metric, outputs)
    assert len(curve) == min(shape) + 1
    for rank in (1, 4, min(shape) - 1):
        spec = Spec.low_rank(*shape, rank)
        near = to_dense(whitened_low_rank(weight, metric, spec, outputs), spec)
        error = relative_error(weight, near, metric, outputs)
        assert error == pytest.approx(float((curve[rank] / curve[0]) ** 0.5), rel=1e-4, abs=1e-6)
    assert curve[-1] == 0


@pytest.mark.parametrize("shape", [(20, 9), (9, 20)])
def test_no_other_matrix_of_that_rank_is_nearer(shape):
    weight, metric, outputs = random(*shape), moment(shape[1], 1), moment(shape[0], 2)
    spec = Spec.low_rank(*shape, 4)
    cores = whitened_low_rank(weight, metric, spec, outputs)
    best = relative_error(weight, to_dense(cores, spec), metric, outputs)
    for seed in range(20):
        other = [core + 1e-3 * random(*core.shape, seed=seed) * core.abs().mean() for core in cores]
        assert relative_error(weight, to_dense(other, spec), metric, outputs) >= best


@pytest.fixture
def recipe():
    return Recipe(fold=(Rule("mlp", Auto(keep=0.5)),))


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("effort", ["low", "medium", "high"])
def test_a_budget_is_met_saved_and_loaded(tiny, tokenizer, prose, tmp_path, architecture, effort):
    model = tiny(architecture).eval()
    report = tensorfold.fold(model, Auto(keep=0.5, effort=effort), tokenizer, [prose], calibration_tokens=512)
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    dense = [matrix for matrix in matrices(tiny(architecture)).values() if matrix.group == "mlp"]
    left = sum(m.parameter.numel() for m in dense) // 2 - sum(choice.parameters for choice in report.choices.values())
    assert left >= 0
    for matrix in dense:  # nobody could have had one rank more
        choice = report.choices[matrix.name]
        if choice.rows or choice.columns:  # of fewer hidden units, which come many at a time
            continue
        costs = pivoted_costs(matrix.out_features, matrix.in_features)
        assert choice.dense or effort == "high" or costs[choice.rank + 1] - costs[choice.rank] > left
    assert set(report.metrics.values()) == {"loss"}
    for name, choice in report.choices.items():
        parameters, errors = zip(*choice.curve, strict=True)
        assert list(parameters) == sorted(parameters)
        assert list(errors) == sorted(errors, reverse=True)
        assert errors[-1] == 0 or choice.columns
        assert choice.dense == (name not in report.modules)
    ids = torch.arange(12)[None]
    model.save_pretrained(tmp_path / "folded")
    assert torch.equal(tensorfold.load(tmp_path / "folded").eval()(ids).logits, model(ids).logits)


def test_the_same_text_gives_the_same_bytes(tiny, tokenizer, prose, recipe):
    folded = []
    for _ in range(2):
        model = tiny("llama").eval()
        tensorfold.fold(model, recipe, tokenizer, [prose], calibration_tokens=512)
        folded.append(model.state_dict())
    assert all(torch.equal(folded[0][key], folded[1][key]) for key in folded[0])


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_it_comes_nearer_to_the_dense_model_than_whitened_svd(tiny, tokenizer, prose, architecture):
    """Distance of logits on the calibration text itself: of random models there is no other quality."""
    dense = tiny(architecture).eval()
    ids = torch.tensor(tokenizer(prose)["input_ids"][:512]).reshape(4, 128)
    with torch.no_grad():
        wanted = dense(ids).logits.log_softmax(-1)
    distances = []
    for method in (LowRank(keep=0.5), Auto(keep=0.5)):
        model = copy.deepcopy(dense)
        tensorfold.fold(model, method, tokenizer, [prose], calibration_tokens=2048)
        with torch.no_grad():
            got = model(ids).logits.log_softmax(-1)
        distances.append((wanted.exp() * (wanted - got)).sum(-1).mean().item())
    assert distances[1] < 0.8 * distances[0]


def test_without_text_all_have_equal_shares(tiny, recipe):
    model = tiny("llama").eval()
    report = tensorfold.fold(model, recipe)
    assert report.choices == {}
    assert set(report.metrics.values()) == {"weight"}
    assert len({spec.parameters / spec.dense_parameters for spec in report.modules.values()}) <= 2
    assert report.modules == plan(tiny("llama"), recipe).modules


def test_tables_are_graded_and_positions_low_rank(tiny):
    planned = plan(tiny("gpt2"), Recipe(fold=(Rule(["embedding", "positions", "mlp"], Auto(keep=0.5)),)))
    kinds = {name: type(method).__name__ for name, method in planned.methods.items()}
    assert kinds["transformer.wte"] == "Graded"
    assert kinds["transformer.wpe"] == "LowRank"
    assert [len(budget.names) for budget in planned.budgets] == [
        sum(matrix.group == "mlp" for matrix in matrices(tiny("gpt2")).values())
    ]


def test_two_rules_have_two_budgets(tiny, tokenizer, prose):
    model = tiny("llama").eval()
    rules = (Rule("mlp", Auto(keep=0.4)), Rule("attention", Auto(keep=0.7)))
    report = tensorfold.fold(model, Recipe(fold=rules), tokenizer, [prose], calibration_tokens=512)
    for group, keep in (("mlp", 0.4), ("self_attn", 0.7)):
        names = [name for name in report.choices if group in name]
        spent = sum(report.choices[name].parameters for name in names)
        dense = sum(matrix.parameter.numel() for name, matrix in matrices(tiny("llama")).items() if name in names)
        assert 0.9 * keep < spent / dense <= keep


@pytest.mark.usefixtures("exact_products")
def test_biases_take_up_what_means_lack(tiny, tokenizer, prose):
    """Behind every block the folded model's states have the dense model's mean on the text, to rounding."""
    model = tiny("gpt2").eval()
    for block in model.transformer.h:  # means that matter
        block.ln_2.bias.data.normal_(generator=torch.Generator().manual_seed(1))
    windows = calibration_windows(tokenizer, [prose], 512, 128)

    @torch.no_grad()
    def states():
        """Behind each block, (blocks, tokens, width)."""
        seen = [[] for _ in model.transformer.h]
        hooks = [
            block.register_forward_hook(lambda _, __, out, k=k: seen[k].append(output_of(out)[0]))
            for k, block in enumerate(model.transformer.h)
        ]
        for window in windows:
            model(window[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        return torch.stack([torch.cat(each) for each in seen]).double()

    before = states()
    tensorfold.fold(model, Auto(keep=0.3), tokenizer, [prose], calibration_tokens=512)
    after = states()
    assert (after - before).abs().mean() > 1e-2 * before.std()
    assert (after.mean(1) - before.mean(1)).abs().max() < 1e-5 * before.std()


def test_efforts_are_named():
    with pytest.raises(InputError, match="effort"):
        Auto(keep=0.5, effort="maximal")
    with pytest.raises(InputError, match="keep"):
        Auto(keep=1.5)


@pytest.mark.parametrize("effort", ["low", "medium"])
def test_an_interrupted_fold_goes_on_where_it_was(tiny, tokenizer, prose, tmp_path, monkeypatch, effort):
    rules = (Rule("embedding", LowRank(keep=0.5)), Rule("all-linear", Auto(keep=0.5, effort=effort)))

    def fold(checkpoint=None):
        model = tiny("llama")
        options = {"calibration_tokens": 512, "checkpoint": checkpoint}
        return tensorfold.fold(model, Recipe(fold=rules), tokenizer, [prose], **options), model.state_dict()

    report, expected = fold()
    solve, calls = folding.solve_matrix, []

    def breaks(matrix, *rest):
        calls.append(matrix.name)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return solve(matrix, *rest)

    monkeypatch.setattr(folding, "solve_matrix", breaks)
    with pytest.raises(KeyboardInterrupt):
        fold(tmp_path / "done")
    before = len(calls)
    again, got = fold(tmp_path / "done")
    assert before < len(calls) < len(report.modules) + before  # some were there already
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    assert (again.errors, again.choices, again.plan.modules) == (report.errors, report.choices, report.plan.modules)


@pytest.fixture
def kept_fold(tiny, tokenizer, prose, tmp_path):
    """``kept_fold()``: the state of a folded model, with a checkpoint in ``tmp_path / "done"``."""

    def fold(checkpoint=True):
        model = tiny("llama")
        options = {"calibration_tokens": 512, "checkpoint": tmp_path / "done" if checkpoint else None}
        tensorfold.fold(model, Auto(keep=0.5), tokenizer, [prose], **options)
        return model.state_dict()

    return fold


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_gradients_are_one_set_of_files_from_the_start(kept_fold, tmp_path, monkeypatch):
    """Nothing as large as all of them is ever in one file, which would have to be held while it is written."""
    expected = kept_fold(checkpoint=False)
    monkeypatch.setattr(stored_gradients.tempfile, "TemporaryDirectory", None)
    assert same(kept_fold(), expected)
    done = tmp_path / "done"
    kept = [path.stat().st_size for path in (done / "gradients").iterdir()]
    assert sorted(kept) == sorted(4 * numbers(size) for size in [48, 48, 32] * 2)
    assert sum((done / f"block-000{k}" / "cores.safetensors").stat().st_size for k in range(2)) < min(kept)


def test_a_search_that_was_interrupted_has_its_gradients(kept_fold, monkeypatch):
    expected, curve, calls = kept_fold(checkpoint=False), search.error_curve, []

    def breaks(*given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return curve(*given)

    with monkeypatch.context() as patched:
        patched.setattr(search, "error_curve", breaks)
        with pytest.raises(KeyboardInterrupt):
            kept_fold()
    monkeypatch.setattr(stored_gradients, "gradient_moments", None)
    assert same(kept_fold(), expected)


def test_models_that_bear_no_rounding_have_exact_gradients(tiny, tokenizer, prose, monkeypatch):
    def strict(*_):
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("expected scalar type Float but found BFloat16")

    def errors(rounds):
        monkeypatch.setattr(gradients, "multiplies_bfloat16", lambda: rounds)
        model = tiny("llama")
        model.model.layers[0].mlp.act_fn.register_forward_pre_hook(strict)
        return tensorfold.fold(model, Auto(keep=0.5), tokenizer, [prose], calibration_tokens=256).errors

    assert errors(rounds=True) == errors(rounds=False)


def test_a_search_on_part_of_the_text_looks_at_all_of_its_documents(tiny, tokenizer, prose, monkeypatch):
    seen, take = [], search.take_gradients
    monkeypatch.setattr(
        search, "take_gradients", lambda model, windows, *rest: seen.append(windows) or take(model, windows, *rest)
    )
    monkeypatch.setitem(search.EFFORTS, "low", replace(search.EFFORTS["low"], gradient_tokens=300))
    documents = [prose[:3000], prose[3000:6000].upper()]
    tensorfold.fold(tiny("llama"), Auto(keep=0.5, effort="low"), tokenizer, documents, calibration_tokens=1200)
    windows = calibration_windows(tokenizer, documents, 1200, seen[0].shape[1])
    assert 1 < len(seen[0]) < len(windows)
    assert torch.equal(seen[0], windows[[len(windows) * k // len(seen[0]) for k in range(len(seen[0]))]])
    assert any(torch.equal(seen[0][-1], late) for late in windows[len(windows) // 2 :])


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_damaged_gradients_are_taken_again(kept_fold, tmp_path, monkeypatch, caplog, damage):
    expected, taken, again = kept_fold(), stored_gradients.gradient_moments, []
    file = tmp_path / "done" / "gradients" / "0002"
    file.unlink() if damage == "gone" else file.write_bytes(file.read_bytes()[::-1])
    monkeypatch.setattr(
        stored_gradients, "gradient_moments", lambda *given, **named: again.append(1) or taken(*given, **named)
    )
    monkeypatch.setattr(folding, "solve_matrix", None)  # what was solved with them stays good
    assert same(kept_fold(), expected)
    assert again
    assert "block-0000 cannot be used" in caplog.text


def test_a_checkpoint_of_another_fold_is_refused(tiny, tokenizer, prose, tmp_path):
    options = {"calibration_tokens": 512, "checkpoint": tmp_path / "done"}
    tensorfold.fold(tiny("llama"), Auto(keep=0.5), tokenizer, [prose], **options)
    flipped = tiny("llama")
    down = flipped.model.layers[0].mlp.down_proj.weight
    down.data = down.data.flip(0)
    others = {"configuration": tiny("llama", hidden_act="gelu"), "weights": flipped, "dtype": tiny("llama").bfloat16()}
    for model in others.values():
        with pytest.raises(InputError, match="another fold"):
            tensorfold.fold(model, Auto(keep=0.5), tokenizer, [prose], **options)
    with pytest.raises(InputError, match="another fold"):
        tensorfold.fold(tiny("llama"), Auto(keep=0.6), tokenizer, [prose], **options)


@pytest.mark.parametrize("budget", ["parameters", "multiply-adds", "bytes"])
def test_budgets_are_of_what_they_say(tiny, tokenizer, prose, budget):
    model = tiny("llama")
    dense = {name: matrix.parameter.nbytes for name, matrix in matrices(model).items() if matrix.group == "mlp"}
    report = tensorfold.fold(model, Auto(keep=0.5, budget=budget), tokenizer, [prose], calibration_tokens=512)
    modules = {name: model.get_submodule(name) for name in dense}
    used = {
        "bytes": sum(t.nbytes for module in modules.values() for t in module.state_dict().values()),
        "parameters": 4 * sum(choice.parameters for choice in report.choices.values()),
        "multiply-adds": 4 * sum(spec.macs for spec in report.modules.values()),
    }
    assert 0.45 < used[budget] / sum(dense.values()) <= 0.5
    assert (used["bytes"] / sum(dense.values()) > 0.5) == (budget != "bytes")


@pytest.mark.parametrize("split", [None, 3])
def test_a_budget_that_cannot_hold_the_floors_is_refused_before_the_text_is_read(
    tiny, tokenizer, prose, monkeypatch, split
):
    """Of bytes a rank of one takes its row order along, which an equal share of the parameters does not."""
    monkeypatch.setattr(calibrate.BlockStream, "__init__", None)
    targets, architecture = (["c_attn"], "gpt2") if split else ("mlp", "llama")
    recipe = lambda keep: Recipe((Rule(targets, Auto(keep=keep, budget="bytes"), split=split),))  # noqa: E731
    options = {"tokenizer": tokenizer, "calibration": [prose], "calibration_tokens": 512}
    with pytest.raises(SpecError, match="keep at least") as refused:
        tensorfold.fold(tiny(architecture), recipe(0.065 if split else 0.054), **options)
    enough = float(re.search(r"keep at least ([\d.]+)", str(refused.value))[1])
    monkeypatch.undo()
    with pytest.raises(SpecError, match="keep at least"):
        tensorfold.fold(tiny(architecture), recipe(enough - 0.01), **options)
    report = tensorfold.fold(tiny(architecture), recipe(enough), **options)
    assert report.choices
    without = {key: value for key, value in options.items() if key == "tokenizer"}
    with pytest.raises(InputError, match="budget has no effect here; it needs calibration text"):
        tensorfold.fold(tiny(architecture), recipe(0.1), **without)


def test_high_effort_finds_columns_that_share_a_basis(tiny, tokenizer, prose, tmp_path):
    """Four groups of columns with one basis: a sum of Kronecker products holds them exactly, low rank does not."""
    model = tiny("llama", intermediate_size=96)
    for block in model.model.layers:
        down = block.mlp.down_proj
        basis = random(3, 24, seed=3).float()
        mix = random(32, 4, 3, seed=4).float()
        down.weight.data = torch.einsum("ogk,kn->ogn", mix, basis).reshape(32, 96) * 0.1
    rules = (Rule(["down_proj"], Auto(keep=0.2, effort="high")),)
    options = {"calibration_tokens": 512, "checkpoint": tmp_path / "done"}
    dense = copy.deepcopy(model)
    report = tensorfold.fold(model, Recipe(fold=rules), tokenizer, [prose], **options)
    choices = list(report.choices.values())
    assert all(choice.rivals for choice in choices)
    assert any(choice.groups > 1 for choice in choices)
    for name, choice in report.choices.items():
        spec = report.modules[name]
        assert (spec.in_modes[0] == choice.groups) if choice.groups > 1 else spec.pivoted
        assert spec.parameters == choice.parameters
        assert report.errors[name] < 0.05 or choice.groups == 1
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    again = copy.deepcopy(dense)
    tensorfold.fold(again, Recipe(fold=rules), tokenizer, [prose], **options)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
