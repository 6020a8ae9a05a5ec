"""Batches that are folded together, and what text says of tables where heads are not plain products."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config

import tensorfold
from tensorfold import Auto, Graded, Kronecker, Recipe, Rule
from tensorfold.calibration.block_stream import inputs_of
from tensorfold.folding import hidden_order
from tensorfold.folding.batches import _scale_of_logits, _undivided
from tensorfold.models.anatomy import matrices

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
HEADS = {
    "plain": (CohereConfig(**SIZES, logit_scale=1.0), 1.0),
    "scaled": (CohereConfig(**SIZES, logit_scale=0.0625), 0.0625),
    "capped": (Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.05), None),
}


@pytest.mark.parametrize("name", HEADS)
def test_scaled_and_capped_logits_are_told_apart(name, tokenizer, prose):
    config, expected = HEADS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    table = next(matrix for matrix in matrices(model).values() if matrix.group == "embedding")
    windows = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = inputs_of(lambda: [model(window[None], use_cache=False) for window in windows], model.lm_head, model)
        scale = _scale_of_logits(model, table, windows, states)
    assert scale == (None if expected is None else pytest.approx(expected, rel=1e-4))
    tensorfold.fold(model, Graded(keep=0.4), tokenizer, [prose], calibration_tokens=256)
    assert torch.isfinite(model(windows, use_cache=False).logits).all()


def test_families_are_folded_with_the_first_of_them():
    stages = [["q", "k"], ["o"], ["gate", "up"], ["down"]]
    assert _undivided(stages, [{"gate", "up", "down"}]) == [["q", "k"], ["o"], ["gate", "up", "down"]]
    assert _undivided(stages, [{"up", "down"}, {"k", "o"}]) == [["q", "k", "o"], ["gate", "up", "down"]]
    assert _undivided(stages, []) == _undivided(stages, [{"elsewhere"}]) == stages


EXACT = Kronecker(factor=(8, 4), terms=32, permute="hidden")
MIXED = {
    "attention": ([Rule("mlp", EXACT), Rule("attention", Auto(keep=0.9))], 3),
    "expanding": ([Rule(["down_proj"], EXACT), Rule("mlp", Auto(keep=0.9))], 1),
    "contracting": ([Rule(["up_proj", "gate_proj"], EXACT), Rule("mlp", Auto(keep=0.9, effort="high"))], 2),
}


@pytest.mark.parametrize("name", MIXED)
def test_hidden_units_are_reordered_beside_layers_that_share_a_budget(
    tiny, tokenizer, prose, tmp_path, monkeypatch, name
):
    """One order for all matrices of an MLP that ask for it, though those of other rules are folded by and by."""
    rules, together = MIXED[name]
    views, find = [], hidden_order.search_row_order
    monkeypatch.setattr(hidden_order, "search_row_order", lambda given: views.append(len(given)) or find(given))
    dense, states = tiny("llama"), []
    ids = torch.arange(20, 120)[None]
    for checkpoint in (None, tmp_path / "done", tmp_path / "done"):
        model = copy.deepcopy(dense)
        options = {"calibration_tokens": 512, "checkpoint": checkpoint}
        report = tensorfold.fold(model, Recipe(tuple(rules)), tokenizer, [prose], **options)
        states.append(model.state_dict())
        with torch.no_grad():
            wanted, got = dense(ids).logits, model(ids).logits
        assert (got - wanted).norm() < 0.03 * (wanted - wanted.mean()).norm()
    assert views == [together] * 2 * 3
    assert report.choices
    for state in states[1:]:
        assert all(torch.equal(state[key], states[0][key]) for key in states[0])
