"""What calibration text says of tables, where heads are not plain products."""

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config

import tensorfold
from tensorfold import Graded
from tensorfold.anatomy import matrices
from tensorfold.batches import _scale_of_logits
from tensorfold.calibrate import inputs_of

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
        states = inputs_of(lambda: [model(window[None], use_cache=False) for window in windows], model.lm_head)
        scale = _scale_of_logits(model, table, windows, states)
    assert scale == (None if expected is None else pytest.approx(expected, rel=1e-4))
    tensorfold.fold(model, Graded(keep=0.4), tokenizer, [prose], calibration_tokens=256)
    assert torch.isfinite(model(windows, use_cache=False).logits).all()
