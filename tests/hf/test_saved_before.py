"""Directories that version 0.1.0 wrote, one a kind of structure: they load bit for bit as they did then."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tensorfold

SAVED = Path(__file__).parents[1] / "fixtures" / "saved-by-0.1"
NAMES = sorted(path.name for path in SAVED.iterdir())


def test_every_kind_of_structure_was_kept():
    kinds = ("graded", "linear", "shapes", "token-mps")
    assert set(NAMES) == {*kinds, *(f"{kind}-int8" for kind in kinds)}


@pytest.mark.parametrize("name", NAMES)
def test_a_directory_of_the_first_version_loads_bit_equal(name):
    model = tensorfold.load(SAVED / name)
    loaded, stored = model.state_dict(), load_file(SAVED / name / "model.safetensors")
    again = {key for key in stored if key == "lm_head.position"}  # the table's own, stored once since
    assert stored.keys() - again <= loaded.keys()
    for key, tensor in stored.items():
        if key in again:
            assert torch.equal(model.get_buffer(key), tensor)
        else:  # whole numbers are stored in a smaller type since
            assert torch.equal(loaded[key].to(tensor.dtype), tensor), key
    for key in loaded.keys() - stored.keys():  # the tied head's names for the table's tensors
        assert loaded[key].data_ptr() in {loaded[other].data_ptr() for other in stored.keys() - again}, key
    with torch.no_grad():
        logits = model(torch.arange(20).reshape(2, 10)).logits
    expected = load_file(SAVED / name / "expected-logits.safetensors")["logits"]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
