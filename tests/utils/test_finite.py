"""Errors about NaN and infinity name the cause: damaged weights, or a dtype whose range is too small."""

import pytest
import torch

from tensorfold import Recipe, evaluate, fold, heal, load
from tensorfold.calibration.block_stream import BlockStream
from tensorfold.calibration.gradients import gradient_moments
from tensorfold.calibration.windows import calibration_windows
from tensorfold.cli.main import run
from tensorfold.errors import InputError, TensorfoldError
from tensorfold.utils.finite import why_not_finite

METHODS = {
    "low-rank": {"targets": "mlp", "method": "low-rank", "keep": 0.5},
    "auto": {"targets": "mlp", "method": "auto", "keep": 0.5},
    "high": {"targets": "all-linear", "method": "auto", "keep": 0.5, "effort": "high"},
}
OVERFLOW = r"float16.*--dtype bfloat16 or float32.*model\.to\(torch\.bfloat16\)"


@pytest.fixture
def large(tiny):
    """A model in float16 with finite weights and an MLP whose products overflow."""

    def make(dtype=torch.float16):
        model = tiny("llama")
        for block in model.model.layers:
            block.mlp.up_proj.weight.data.mul_(2e4)
            block.mlp.down_proj.weight.data.mul_(2e4)
        return model.to(dtype)

    return make


def test_the_remedy_is_an_option_of_every_command_that_computes(large, tokenizer, prose, tmp_path, capsys):
    for each in (model := large(), tokenizer):
        each.save_pretrained(tmp_path / "half")
    del model
    text = tmp_path / "text.txt"
    text.write_text(prose)
    wider, to = ("--dtype", "bfloat16"), (str(tmp_path / "out"), str(tmp_path / "healed"))
    folding = ("fold", str(tmp_path / "half"), "--keep", "0.5", "--calibrate", str(text), "--tokens", "500", "--out")
    judging = ("eval", str(tmp_path / "half"), "--text", str(text), "--protocol", "disjoint-32")
    for command in ((*folding, to[0]), judging):
        with pytest.raises(SystemExit) as left:
            run(list(command))
        assert left.value.code in (1, 2)
        assert "--dtype bfloat16" in capsys.readouterr().err
    for command in (
        (*folding, to[0]),
        judging,
        ("sample", str(tmp_path / "half"), "--tokens", "2"),
        ("heal", to[0], "--train", str(text), "--teacher", str(tmp_path / "half"), "--steps", "1", "--block", "16",
         "--batch", "2", "--out", to[1]),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as left:
            run([*command, *wider])
        assert left.value.code == 0
    assert next(load(to[1]).parameters()).dtype is torch.bfloat16


@pytest.mark.parametrize("method", METHODS)
def test_a_fold_that_overflows_says_float16_and_not_repair(large, tokenizer, prose, method):
    recipe = Recipe.from_dict({"fold": [METHODS[method]]})
    with pytest.raises(InputError, match=OVERFLOW) as raised:
        fold(large(), recipe, tokenizer, [prose], calibration_tokens=500)
    assert "repair" not in str(raised.value)
    fold(large(torch.bfloat16), recipe, tokenizer, [prose], calibration_tokens=500)


def test_an_evaluation_that_overflows(large, tokenizer, prose):
    with pytest.raises(TensorfoldError, match=OVERFLOW):
        evaluate(large(), tokenizer, prose, "disjoint-32")
    assert evaluate(large(torch.float32), tokenizer, prose, "disjoint-32").perplexity > 1


def test_gradients_that_overflow(tiny):
    model = tiny("llama", tie_word_embeddings=False)
    model.lm_head.weight.data.mul_(3e4)  # the forward pass stays in float16's range, the backward pass does not
    model = model.to(torch.float16)
    layer = model.model.layers[0].mlp.down_proj
    with pytest.raises(InputError, match=rf"down: the loss's gradients.*{OVERFLOW}"):
        gradient_moments(model, torch.arange(3, 19)[None], {"down": layer})


@pytest.mark.parametrize("stages", [{"steps": 1, "kl": 1.0, "batch": 2}, {"steps": 0, "blockwise_tokens": 64}])
def test_a_teacher_that_overflows(tiny, large, tokenizer, prose, stages):
    student = tiny("llama")
    fold(student, Recipe.from_dict({"fold": [METHODS["low-rank"]]}))
    with pytest.raises(TensorfoldError, match=OVERFLOW):
        heal(student, [prose], large(), tokenizer=tokenizer, block=16, validation_fraction=0.0, **stages)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    "run",
    [
        lambda model, tokenizer, prose: evaluate(model, tokenizer, prose, "disjoint-32"),
        lambda model, tokenizer, prose: BlockStream(model, calibration_windows(tokenizer, [prose], 64, 32)),
    ],
)
def test_damaged_weights_are_named(tiny, tokenizer, prose, dtype, run):
    model = tiny("llama").to(dtype)
    model.model.layers[1].input_layernorm.weight.data[3] = float("nan")
    with pytest.raises(TensorfoldError, match=r"model\.layers\.1\.input_layernorm\.weight .*repair the checkpoint"):
        run(model, tokenizer, prose)


def test_finite_weights_in_a_wide_dtype_are_neither(tiny):
    said = why_not_finite(tiny("llama"))
    assert "float32" in said
    assert "float16" not in said
    assert "repair" not in said
